# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 11 · Your own variant
#
# **The question.** You have an idea for a better update than $s \, B A$. Such an idea is called a *variant* of LoRA. How do you know that
# what you have written is what you mean, before days of training go into it?
#
# Other parts of minilora ask an adapter for its update as one matrix, $\Delta W$: to *merge* it (add it into the weight, so that it costs
# nothing when the model runs), to measure it, to give it to other programs. Training asks it for an output. Both must be the same
# function. This is *the law* of adapters: for every input $x$, with frozen weight $W$ and bias $b$,
#
# $$\text{adapter}(x) = (W + \Delta W) \, x + b .$$
#
# The idea of this lesson: every output of the layer gets a *volume* of its own, a number that is trained too and begins at 1. With
# volumes $v$ the update is $\Delta W = \operatorname{diag}(v) \, s B A$: row $i$ of $s B A$, times $v_i$.
#
# A variant is a class. `register` gives the class a name, by which a user asks for it. Its method `update(x)` says what is added to the
# output of the base layer, the frozen layer that the adapter stands on.

# %%
import copy
import tempfile
from statistics import mean

import matplotlib.pyplot as plt
import torch

from minilora import LoraConfig, LoRALinear, inject, load_adapter, merge, register, save_adapter
from minilora.errors import StateError
from minilora.lab import sweep, trials_of
from minilora.lab.byte_model import byte_model, code, text_examples
from minilora.training.settings import TrainConfig


@register("volume_draft")
class Draft(LoRALinear):
    """The first try. It trains, and it is wrong in three places."""

    def __init__(self, base_layer, config, path=""):
        super().__init__(base_layer, config, path)
        self.volume = torch.nn.Parameter(torch.ones(self.out_features, device=self.weight.device))

    def update(self, x):
        return self.volume.to(x.dtype) * super().update(x)


# %% [markdown]
# ## The law as a test
#
# The test first looks at the start: a fresh adapter must leave the output as it is. But a fresh adapter has $B = 0$, and zero hides every
# mistake: a wrong factor, a wrong order, a part that is missing. So the test gives all that trains random values, and asks in four ways
# for the same output. That makes five lines: a start, and four ways.
#
# Two outputs count as equal if they differ by less than $10^{-5}$ of the largest output. A number of 32 bits is rounded by about
# $10^{-7}$ in each step of a calculation, and a few steps stay far below the limit. A wrong factor is far above it: larger than
# $10^{-2}$.
#
# `inject` puts an adapter of the class into the place of the layer that is called `0`, the first one of a `Sequential`.


# %%
def make(variant, seed=0):
    """A layer of 20 inputs and 30 outputs with an adapter: not square, so that a swap of the two shows."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30)).eval()
    return inject(model, LoraConfig(r=4, lora_alpha=12, target_modules=["0"]), variant=variant)


@torch.no_grad()
def law(variant):
    """By check, the largest difference of two outputs that must be equal, relative to the largest output."""
    x, model = torch.randn(50, 20, generator=torch.Generator().manual_seed(1)), make(variant)
    found, adapter = {}, model[0]
    base = adapter.base_layer

    def compare(name, output, wanted):
        found[name] = float((output - wanted).abs().max() / wanted.abs().max())

    compare("start: no update", model(x), base(x))
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.normal_()
    compare("the law", model(x), base(x) + x @ adapter.delta_weight().T)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, f"{folder}/saved")
        again = torch.nn.Sequential(copy.deepcopy(base)).eval()
        load_adapter(again, f"{folder}/saved")
    compare("saved and loaded", again(x), model(x))
    A, B = adapter.as_lora()
    compare("given away as B A", base(x) + x @ (B @ A).T, model(x))
    output = model(x)
    merge(model)
    compare("merged", model(x), output)
    for name, error in found.items():
        print(f"{name:18} {error:7.0e}  {'holds' if error < 1e-5 else 'FAILS'}")
    return found


draft = law("volume_draft")

# %% [markdown]
# It starts well, and then nothing holds. `delta_weight` is inherited from LoRA and knows nothing of volumes, so merging changes what the
# model says. `as_lora`, the pair of matrices for other programs, lacks them too. And the file has no volumes: after loading they are 1
# again.
#
# None of this shows while you train. Here the draft learns an update of rank 3 in twenty steps, and its loss falls. The trouble comes
# later, when the adapter is used, here when it is merged:

# %%
torch.manual_seed(0)
model, x = make("volume_draft"), torch.randn(200, 20)
wanted = model(x).detach() + x @ torch.randn(20, 3) @ torch.randn(3, 30) / 8
optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
for step in range(1, 21):
    loss = (model(x) - wanted).square().mean()
    if step in (1, 5, 10, 15, 20):
        print(f"step {step:2}: loss {loss:.4f}")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"trained: loss {(model(x) - wanted).square().mean():.4f}")
merge(model)
print(f"merged:  loss {(model(x) - wanted).square().mean():.4f}")

# %% [markdown]
# ## The law holds
#
# Three things are said now: what the update is as a matrix, what it is as a pair of matrices, and what is saved under which name. The
# last is a dictionary, `file_names`: for each attribute of the adapter that is saved, what the file calls it.


# %%
@register("volume")
class Volume(Draft):
    """LoRA with a trained volume for each output."""

    file_names = LoRALinear.file_names | {"volume": "lora_volume"}

    def delta_weight(self):  # dense, [out, in]
        return self.volume[:, None] * super().delta_weight()

    def as_lora(self):  # (A, B) with delta_weight() == B @ A
        A, B = super().as_lora()
        return A, self.volume[:, None] * B


final = law("volume")
figure, axes = plt.subplots(figsize=(8, 2.8))
for shift, label, found in ((-0.2, "draft", draft), (0.2, "final", final)):
    places = [at + shift for at in range(len(found))]
    axes.barh(places, [max(error, 1e-9) for error in found.values()], 0.38, left=1e-9, label=label)
axes.axvline(1e-5, color="black", linestyle=":", label="tolerance")
axes.set_yticks(range(len(final)), list(final))
axes.set(xscale="log", xlim=(1e-9, 20), ylim=(-0.9, 4.5))
axes.set_xlabel("largest difference of outputs, relative (0 is drawn as a stump)")
axes.invert_yaxis()
axes.legend(frameon=False, loc="upper right", ncols=3)
plt.show()

# %% [markdown]
# What is left is the rounding of numbers of 32 bits. The tests in `tests/laws` of the repository ask this and more of every variant that
# is registered, on packed layers and in other number formats; [the guide to variants](../guides/variants.md) says how to run them on
# yours.
#
# ## Is it better?
#
# The measurement: both variants fine-tune the byte model on code, at three learning rates and with three seeds. A *seed* is the number
# from which all random choices follow. What is compared is the loss on code that was not learnt, in nats a byte (1 nat = 1.44 bits), each
# variant at the best of its rates.

# %%
examples, unseen = text_examples(code(), 64)[::40], text_examples(code(held_out=True), 64)[::200]
lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
trials = trials_of("variant=lora,volume lr=1e-3,3e-3,1e-2", seeds=3, lora=lora, train=TrainConfig(steps=20))
results = sweep(byte_model(), examples, trials, evaluation=unseen, say=lambda line: None)
best = {}
for variant in ("lora", "volume"):
    of_rate = {}
    for result in results:
        if result.trial.variant == variant:
            of_rate.setdefault(result.trial.train.lr, []).append(result.eval_loss)
    for lr, losses in of_rate.items():
        print(f"{variant:6} lr {lr:<5g}: {', '.join(f'{loss:.5f}' for loss in losses)}, on average {mean(losses):.5f}")
    best[variant] = min(of_rate.values(), key=mean)
differences = [new - old for old, new in zip(best["lora"], best["volume"], strict=True)]
print("volume - lora, at the best rates:", ", ".join(f"{difference:+.5f}" for difference in differences))
lower, apart = sum(difference < 0 for difference in differences), max(best["lora"]) - min(best["lora"])
print(f"lower with {lower} of {len(differences)} seeds, by {-mean(differences):.5f} on average")
print(f"another seed changes the loss of LoRA by up to {apart:.5f}")

# %% [markdown]
# With one seed both variants begin with the same $A$ and read the same data, so they are compared seed by seed. What the volumes change is
# far less than what another seed changes, and at the largest rate it goes the other way. So twenty steps do not show that the volumes
# help. That is a result, too.
# `minilora lab variants --plugin FILE` makes the comparison with more steps, a rate tuned for each variant, and an interval beside each
# difference.
#
# ## What would break if
#
# **… the update were bent?** Let each output of the update go through a `tanh`, so that it stays between -1 and 1. There is no matrix
# that does the same for all inputs, so the law cannot hold. Such an adapter can be trained and saved, and it must refuse to be a matrix.
# `depends_on_input = True` says to the rest of minilora that it has none:


# %%
@register("bent")
class Bent(LoRALinear):
    depends_on_input = True

    def update(self, x):
        return torch.tanh(super().update(x))

    def delta_weight(self):
        raise StateError("the update of a Bent depends on the input, so it is no matrix and cannot be merged")

    as_lora = delta_weight  # nor can it be given away as a pair of matrices


try:
    merge(make("bent"))
except StateError as error:
    print(error)

# %% [markdown]
# ## Exercises
#
# `minilora learn 11` puts the exercises of this lesson into a file of yours, and `minilora learn check 11` grades what you wrote.

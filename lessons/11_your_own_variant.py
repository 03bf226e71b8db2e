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
# nothing when the model runs), to measure it, to give it to other programs. Training asks it for an output. Both must be the same function.
# This is *the law* of adapters: for every input $x$, with frozen weight $W$ and bias $b$,
#
# $$\text{adapter}(x) = (W + \Delta W) \, x + b .$$
#
# The idea of this lesson: every output of the layer gets a *volume* of its own, a number that is trained too and begins at 1. With volumes
# $v$ the update is $\Delta W = \operatorname{diag}(v) \, s B A$: row $i$ of $s B A$, times $v_i$.

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

    def update(self, x):  # what is added to the base layer's output
        return self.volume.to(x.dtype) * super().update(x)


# %% [markdown]
# ## The law as a test
#
# The test gives all that trains random values. A fresh adapter has $B = 0$, and zero hides every mistake: a wrong factor, a wrong order, a
# part that is missing. Then it asks in four ways for the same output.


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
# None of this shows while you train. The loss falls, and all the trouble comes later, when the adapter is used.
#
# ## The law holds
#
# Three things are said now: what the update is as a matrix, what it is as a pair of matrices, and what is saved under which name.


# %%
@register("volume")
class Volume(Draft):
    """LoRA with a trained volume for each output."""

    file_names = LoRALinear.file_names | {"volume": "lora_volume"}  # attribute -> name in the file

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
# What is left is the rounding of numbers of 32 bits. The tests in `tests/laws` of the repository ask this and more of every variant that is
# registered, on packed layers and in other number formats; [the guide to variants](../guides/variants.md) says how to run them on yours.
#
# ## Is it better?
#
# The measurement: both variants fine-tune the byte model on code, at two learning rates and with three seeds. A *seed* is the number from
# which all random choices follow. What is compared is the loss on code that was not learnt, in nats a byte, each variant at its better
# rate.

# %%
examples, unseen = text_examples(code(), 64)[::40], text_examples(code(held_out=True), 64)[::200]
lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
trials = trials_of("variant=lora,volume lr=3e-3,1e-2", seeds=3, lora=lora, train=TrainConfig(steps=20))
results = sweep(byte_model(), examples, trials, evaluation=unseen, say=lambda line: None)
best = {}
for variant in ("lora", "volume"):
    of_rate = {}
    for result in results:
        if result.trial.variant == variant:
            of_rate.setdefault(result.trial.train.lr, []).append(result.eval_loss)
    lr, best[variant] = min(of_rate.items(), key=lambda item: mean(item[1]))
    print(f"{variant:7} lr {lr:g}: {', '.join(f'{loss:.4f}' for loss in best[variant])}")
differences = [new - old for old, new in zip(best["lora"], best["volume"], strict=True)]
print("volume - lora:   ", ", ".join(f"{difference:+.4f}" for difference in differences))

# %% [markdown]
# With one seed both variants begin with the same $A$ and read the same data, so they are compared seed by seed. The volumes change next to
# nothing in twenty steps: another seed changes more than another variant. That is a result, too. `minilora lab variants --plugin FILE`
# makes the comparison with more steps, a rate tuned for each variant, and an interval beside each difference.
#
# ## What would break if
#
# **… the update were bent?** Let each output of the update go through a `tanh`, so that it stays between -1 and 1. There is no matrix that
# does the same for all inputs, so the law cannot hold. Such an adapter can be trained and saved, and it must refuse to be a matrix:


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

# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 10 · Many adapters
#
# **The question.** An adapter is small and the model under it is large. How can many adapters share one model: one at a time, several at
# once, or a different one for each row of a batch?
#
# A *batch* is several texts that the model computes together, one text a row. If row $i$ wants the adapter $a(i)$, a layer with the
# frozen weight $W$ computes for it
#
# $$y_i = W x_i + s_{a(i)}\, B_{a(i)} A_{a(i)}\, x_i .$$
#
# ($s$ is the scaling, `lora_alpha / r`.) The large product with $W$ is the same for all rows. Only the thin factors differ. They are
# stacked, and each row picks its own out of the stack. By hand, with one layer and three adapters:

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from minilora import LoraConfig, add_weighted_adapter, batch_adapters, delete_adapter, inject, set_adapter
from minilora.lab.byte_model import byte_model
from minilora.many.adapted import disabled

torch.manual_seed(0)
inputs, outputs, r, scaling = 48, 32, 4, 2.0
W, A, B = torch.randn(outputs, inputs), torch.randn(3, r, inputs), torch.randn(3, outputs, r)
x, wants = torch.randn(5, inputs), torch.tensor([2, 0, 0, 1, 2])

thin = torch.bmm(A[wants], x[:, :, None])  # A of each row times the row: [5, r, 1]
y = x @ W.T + scaling * torch.bmm(B[wants], thin)[:, :, 0]
one_by_one = torch.stack([W @ row + scaling * B[a] @ (A[a] @ row) for row, a in zip(x, wants, strict=True)])
print(f"off from one row after the other by {(y - one_by_one).norm() / y.norm():.0e}")

# %% [markdown]
# `torch.bmm` multiplies many small matrices in one call, so there is no loop over adapters.
#
# ## Two adapters in one model
#
# The small model that comes with minilora knows none of these facts. One adapter learns the capitals by heart, another one the colours. A
# model is right about a fact to the degree of the probability that it gives to the whole answer.

# %%
FACTS = {
    "capital": {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Egypt": "Cairo", "Japan": "Tokyo"},
    "colour": {"snow": "white", "coal": "black", "grass": "green", "the sky": "blue", "a lemon": "yellow"},
}
LENGTH = 40


def tokens_of(kind):
    """Token ids ``[5, LENGTH]``, a token a byte, and labels: the answer's ids, and -100 where nothing is to be learnt."""
    lines = [(f"The {kind} of {what} is ".encode(), f"{answer}.\n".encode()) for what, answer in FACTS[kind].items()]
    ids = [list((prompt + answer).ljust(LENGTH, b"\0")) for prompt, answer in lines]
    labels = [([-100] * len(prompt) + list(answer) + [-100] * LENGTH)[:LENGTH] for prompt, answer in lines]
    return torch.tensor(ids), torch.tensor(labels)


def log_probability(ids, labels):
    logits = model(input_ids=ids).logits[:, :-1]  # what stands at a place predicts the next token
    return -F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none").sum(1)


def knows():
    """The mean probability of the right answers, for capitals and for colours."""
    with torch.no_grad():
        return [float(log_probability(*tokens_of(kind)).exp().mean()) for kind in FACTS]


def said():
    return "capitals {:.2f}, colours {:.2f}".format(*knows())


model = byte_model()
for kind in FACTS:
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    for _ in range(60):
        (-log_probability(*tokens_of(kind)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

# %% [markdown]
# ## Switching: what stands in the slot
#
# The place of a layer in the module around it is called a *slot*. minilora switches adapters by putting another object there. Nothing is
# copied and nothing is computed: all these objects hold the same frozen layer.

# %%
attention = model.model.layers[0].self_attn
frozen = attention.q_proj.base_layer
for name in FACTS:
    set_adapter(model, name)
    layer = attention.q_proj
    print(f"{name:8} a {type(layer).__name__} around the frozen layer: {layer.base_layer is frozen}; knows {said()}")
with disabled(model):
    print(f"none     the frozen layer itself: {attention.q_proj is frozen}; knows {said()}")
small = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
large = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
print(f"numbers in an adapter {small:,}, in the model {large:,}")

# %% [markdown]
# ## Another adapter for each row
#
# Now a batch that mixes capitals, colours, and rows that want no adapter at all. Each row must come out as if it had been computed alone
# with its adapter.

# %%
model.eval()
ids = torch.cat([tokens_of("capital")[0], tokens_of("colour")[0]])
names = ["capital"] * 4 + ["__base__"] * 2 + ["colour"] * 4
with torch.no_grad():
    with batch_adapters(model, names):
        mixed = model(input_ids=ids).logits
    apart = {}
    for name in FACTS:
        set_adapter(model, name)
        apart[name] = model(input_ids=ids).logits
    with disabled(model):
        apart["__base__"] = model(input_ids=ids).logits
print("largest difference of these rows from a separate call with ...")
for name in apart:
    rows = [row for row, wanted in enumerate(names) if wanted == name]
    off = (f"{other} {float((mixed[rows] - apart[other][rows]).abs().max()):.0e}" for other in apart)
    print(f"rows of {name:9}", ", ".join(off))

# %% [markdown]
# ## Sums
#
# Updates can also be added: with weights $w_1$ and $w_2$ a layer gets $w_1 D_1 + w_2 D_2$, where $D_1$ and $D_2$ are the updates of the
# two adapters. Stacking their factors does this exactly, at the sum of their ranks; PEFT, the usual library for adapters, calls it "cat".
# But does the sum know what both have learnt?

# %%
shares = [step / 8 for step in range(9)]
figure, panels = plt.subplots(1, 2, figsize=(8.5, 3.4), sharey=True, layout="constrained")
for axes, title, weights in (
    (panels[0], "from one to the other", [(1 - share, share) for share in shares]),
    (panels[1], "both at the same weight", [(share, share) for share in shares]),
):
    known = []
    for pair in weights:
        add_weighted_adapter(model, list(FACTS), list(pair), "sum", "cat")
        set_adapter(model, "sum")
        known.append(knows())
        delete_adapter(model, "sum")
    axes.plot(shares, known, "o-", markersize=4, label=["capitals", "colours"])
    axes.set(title=title, xlabel="weight of the colours' adapter")
panels[0].set_ylabel("probability of the right answer")
panels[0].legend(frameon=False)
plt.show()
set_adapter(model, list(FACTS))  # both active, which is the sum with weights 1 and 1
print(f"both active: knows {said()}")

# %% [markdown]
# No sum knows all that the two know apart. Each of them was trained for a model in which the other one is not there. What one adds to the
# input of a layer is a disturbance for the other: at full weights they spoil each other, at small ones neither is heard. If you want
# both, train one adapter on both, or pick for each row. The guide [Many adapters](../guides/adapters.md) has other ways to combine, and
# none of them is sure to work.
#
# ## What would break if
#
# **… the factors were added instead of stacked?** $(B_1 + B_2)(A_1 + A_2)$ has two more terms than the sum of the updates, $B_1 A_2$ and
# $B_2 A_1$, which nobody has trained. PEFT has this way too and calls it "linear". The update of one layer, and what the model knows, at
# weights of a half:

# %%
half = {}
for way in ("cat", "linear"):
    add_weighted_adapter(model, list(FACTS), [0.5, 0.5], way, way)
    set_adapter(model, way)
    half[way] = attention.q_proj.delta_weight().detach()
    print(f"{way:6} size of the update {half[way].norm():.2f}; knows {said()}")
off = (half["linear"] - half["cat"]).norm() / half["cat"].norm()
print(f"'linear' is off the sum of the updates by {off:.0%}")

# %% [markdown]
# ## Exercises
#
# `minilora learn 10` puts the exercises of this lesson into a file of yours, and `minilora learn check 10` grades what you wrote.

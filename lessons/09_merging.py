# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 9 · Merging, and what rounding eats
#
# **The question.** After training, the update of an adapter can be added into the weights. Then the model needs no adapter beside it, and
# costs what it cost before. Is it still the same model?
#
# Adding the update into the weights is called *merging*. A weight is stored in some format: 32 bits, 16 bits, or the 4 bits of [lesson
# 5](05_one_block_by_hand.py). A format has only certain numbers, so the sum is *rounded* to the nearest of them:
#
# $$W' = \text{round}\left(W + D\right) , \qquad D = \frac{\alpha}{r} B A .$$
#
# The number $\alpha$ is called `lora_alpha` in code. What is made of the wanted change $D$ is $W' - W$; so the share of it that survives
# is
#
# $$\text{survives} = 1 - \frac{\lVert (W' - W) - D \rVert}{\lVert D \rVert} .$$
#
# It is 1 if the change is the one that was wanted, and 0 if it is as wrong as no change at all (or worse).

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from minilora import LoraConfig, LoRALinear, QuantConfig, inject, merge, quantize, quantize_model, unmerge
from minilora.lab.byte_model import byte_model, code
from minilora.linear.layers import dense_weight

weight = torch.tensor(0.02).bfloat16()
step = float(torch.nextafter(weight, torch.tensor(1.0).bfloat16()) - weight)
print(f"in bfloat16, the number after {float(weight):.6f} is {float(weight) + step:.6f}")
for change in (0.3 * step, 0.4 * step, 0.6 * step, 5.3 * step):
    made = float((weight.float() + change).bfloat16() - weight)
    print(f"wanted {change / step:.1f} steps, made {made / step:.0f}")

# %% [markdown]
# A *step* is the distance to the next number of the format, and bfloat16 is the 16-bit format of most language models. A change of less
# than half a step is lost whole. How large are the changes that training makes, beside the steps of a format?
#
# ## A trained adapter
#
# The small model that comes with minilora reads English; we pack it into 4 bits and teach it Python code for a few seconds. Its loss on
# code that it does not learn from tells how good the adapter is.

# %%
config = QuantConfig("nf4", blocksize=64)
text = torch.tensor(list(code(held_out=True)[: 80 * 129])).view(80, 129)
learnt, held_out = text[:64], text[64:]


def loss_of(model, ids):
    logits = model(input_ids=ids[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def judge(model):
    with torch.no_grad():
        return float(loss_of(model, held_out))


torch.manual_seed(0)
model = quantize_model(byte_model(), config)
before = judge(model)
inject(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4, weight_decay=0.0)
for _ in range(48):
    loss_of(model, learnt[torch.randperm(64)[:8]]).backward()
    optimizer.step()
    optimizer.zero_grad()
after = judge(model)
layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
weights = [dense_weight(layer.base_layer) for layer in layers]
updates = [layer.delta_weight().detach() for layer in layers]
size = torch.cat([D.flatten() for D in updates]).norm() / torch.cat([W.flatten() for W in weights]).norm()
print(f"loss {before:.3f} without the adapter, {after:.3f} with it; the update is {size:.1%} of the weights' size")

# %% [markdown]
# ## What becomes of each change
#
# For one layer, each point is a weight. To the right stands the change that was wanted, upward the one that was made. All points should
# lie on the line.

# %%
formats = {
    "32 bits": lambda W: W,
    "16 bits (bfloat16)": lambda W: W.bfloat16().float(),
    "4 bits (NF4)": lambda W: quantize(W, config).dequantize(),
}


def survives(rounded, factor):
    """The share of all updates, each times ``factor``, that is left after rounding."""
    error = wanted = 0.0
    for W, D in zip(weights, updates, strict=True):
        W, D = rounded(W), factor * D
        error += float(((rounded(W + D) - W) - D).square().sum())
        wanted += float(D.square().sum())
    return max(0.0, 1 - (error / wanted) ** 0.5)


figure, panels = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
for axes, (name, rounded) in zip(panels, list(formats.items())[1:], strict=True):
    W, D = rounded(weights[0]), updates[0]
    made = rounded(W + D) - W
    axes.axline((0, 0), slope=1, color="#bbbbbb")
    axes.plot(D[:16].flatten(), made[:16].flatten(), ".", markersize=2, color="#1f4e79")
    axes.set(title=name, xlabel="change that was wanted", ylabel="change that was made")
    axes.locator_params(axis="x", nbins=5)
plt.show()

# %% [markdown]
# In 16 bits the points form short stairs along the line. In 4 bits the steps are larger than most changes: nearly every weight keeps its
# code, and moves only a little because the scale of its block moves. A few weights jump to the next level, and further than they should.
#
# ## How large must an update be?
#
# The same update, made smaller and larger. The dotted line is the size that training gave it.

# %%
sizes = torch.logspace(-4, 0, 13)
figure, axes = plt.subplots(figsize=(7, 3.4))
for (name, rounded), colour in zip(formats.items(), ("#999999", "#1f4e79", "#c0504d"), strict=True):
    axes.semilogx(
        sizes, [survives(rounded, float(s / size)) for s in sizes], "o-", color=colour, markersize=4, label=name
    )
    print(f"{name:18}  as trained {survives(rounded, 1.0):4.0%}, a tenth of it {survives(rounded, 0.1):4.0%} survives")
axes.axvline(float(size), color="black", linestyle=":", linewidth=1)
axes.set(xlabel="size of the update / size of the weights", ylabel="share that survives")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## The measurement: the model
#
# minilora merges a packed layer into a dense one in the dtype that it had before it was packed, 32 bits here. With `requantize=True` it
# packs the sum again. Either way it says what survived, and keeps the old layer, so that `unmerge` puts the very same bytes back.

# %%
report = merge(model)
print(f"as {report.into}: {report.survived:.0%} survives, loss {judge(model):.3f}")
unmerge(model)
report = merge(model, requantize=True)
print(f"as {report.into}: {report.survived:.0%} survives, loss {judge(model):.3f}")
unmerge(model)
print(f"taken out again: loss {judge(model):.3f}; without the adapter it was {before:.3f}")

# %% [markdown]
# Packed again, the model has lost most of what the adapter had taught it, though not all: the few weights that jump do so in the right
# direction. So a packed model should keep its adapter beside it, or be merged into 16 bits or more. The guide [Many
# adapters](../guides/adapters.md) has the commands.
#
# ## What would break if
#
# **… unmerging subtracted the update again?** The weights would come back rounded a second time. minilora keeps the layer instead.

# %%
half, D = weights[0].bfloat16(), updates[0]
back = ((half.float() + D).bfloat16().float() - D).bfloat16()
print(f"{(back != half).float().mean():.0%} of the weights are not what they were")

# %% [markdown]
# **… the update came in a hundred small parts, each of them rounded?** This is what happens when weights in 16 bits are trained directly
# with small steps, and a reason to keep adapters in 32 bits while they learn.

# %%
stepwise = half.clone()
for _ in range(100):
    stepwise = (stepwise.float() + D / 100).bfloat16()
for name, merged in (("at once", (half.float() + D).bfloat16()), ("in a hundred parts", stepwise)):
    error = merged.float() - half.float() - D
    print(f"{name}: {max(0.0, float(1 - error.norm() / D.norm())):.0%} survives")

# %% [markdown]
# ## Exercises
#
# `minilora learn 9` puts the exercises of this lesson into a file of yours, and `minilora learn check 9` grades what you wrote.

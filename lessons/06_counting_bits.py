# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 6 · Counting bits
#
# **The question.** A model "in 4 bits" takes more than 4 bits a weight. How many are they exactly, where do they go, and what would be
# lost with fewer?
#
# [Lesson 5](05_one_block_by_hand.py) showed one block: 64 weights become 64 *codes*, each the number of a level in a table, and one
# *scale*, by which the levels are multiplied. The scale is a number of 32 bits that 64 weights share. With $b$ bits a code and blocks of
# $B$ weights this is
#
# $$\text{bits a weight} = b + \frac{32}{B} .$$
#
# For 4 bits and blocks of 64 it is 4.5: the scales alone take half a bit a weight. *Double quantization* stores them in 8 bits each. It
# treats the scales as lesson 5 treats weights: it takes 256 of them, and divides them by their own largest magnitude, which is kept in 32
# bits.
#
# $$\text{bits a weight} = b + \frac{8}{B} + \frac{32}{256\,B} .$$
#
# Before that it takes the mean of all scales away, which is one more number for the whole weight. We count the bytes that minilora keeps
# (`bits_per_weight` does it), and compare.

# %%
import warnings

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from minilora import QuantConfig, quantize, quantize_model
from minilora.lab.byte_model import byte_model, docs
from minilora.quant.nested import nested_scales, unnested

torch.manual_seed(0)
weight = torch.randn(1024, 1024) * 0.02


def formula(bits, blocksize, double_quant):
    return bits + (8 / blocksize + 32 / (256 * blocksize) if double_quant else 32 / blocksize)


print("codes                   counted  formula   MB for 7 billion weights")
for name, bits in (("int8", 8), ("nf4", 4), ("nf3", 3), ("nf2", 2)):
    for double_quant in (False, True):
        stored = quantize(weight, QuantConfig(name, blocksize=64, double_quant=double_quant))
        counted, expected = stored.bits_per_weight, formula(bits, 64, double_quant)
        kind = f"{name}, scales in {8 if double_quant else 32} bits"
        print(f"{kind:22}  {counted:7.3f}  {expected:7.3f}   {7e9 * counted / 8 / 1e6:,.0f}")
counted = 8 * weight.nbytes / weight.numel()
print(f"{'not packed':22}  {counted:7.3f}            {7e9 * counted / 8 / 1e6:,.0f}")

# %% [markdown]
# *int8* has 256 even steps. *NF4*, *NF3* and *NF2* have 16, 8 and 4 levels, each set placed by the same rule for weights that are spread
# like a normal distribution.
#
# ## What the second quantization costs
#
# A scale in 8 bits is not quite the scale. But its error is small beside that of a weight in 4 bits:

# %%
absmax = quantize(weight, QuantConfig("nf4", blocksize=64)).absmax
kept = nested_scales(absmax, "the scales")
again = unnested(kept["absmax"], kept["nested_absmax"], kept["nested_offset"])
off = ((again - absmax) / absmax).abs().mean()
print(f"{len(absmax)} scales, their mean {absmax.mean():.4f}; mean error of a scale {off:.2%}")


def error(name, blocksize, double_quant=False):
    """The error of a weight that was packed, as a share of its size."""
    back = quantize(weight, QuantConfig(name, blocksize, double_quant)).dequantize()
    return float((back - weight).norm() / weight.norm())


print(f"error of the weight: {error('nf4', 64):.3%}; with scales in 8 bits {error('nf4', 64, True):.3%}")

# %% [markdown]
# ## What a bit buys
#
# There are two ways to spend bits: more levels, or smaller blocks, in which the largest weight is less far from the others. The picture
# has two lines for each table of levels, one for each way to keep the scales, and a point for each size of a block. Its vertical axis is
# logarithmic: each line of the grid stands for half the error of the line above it.

# %%
sizes = (32, 64, 128, 256, 512, 1024)
figure, axes = plt.subplots(figsize=(7, 3.8))
for (name, bits), colour in zip((("nf2", 2), ("nf3", 3), ("nf4", 4)), ("C3", "C1", "C0"), strict=True):
    for double_quant, style in ((False, "o--"), (True, "o-")):
        points = [(formula(bits, size, double_quant), error(name, size, double_quant)) for size in sizes]
        label = f"{name.upper()}, scales in {8 if double_quant else 32} bits"
        axes.plot(*zip(*points, strict=True), style, color=colour, markersize=4, linewidth=1, label=label)
axes.set_yscale("log", base=2)
axes.set_yticks([0.5, 0.25, 0.125, 0.0625], ["50 %", "25 %", "12.5 %", "6.25 %"])
axes.grid(axis="y", color="#dddddd")
axes.set_xlabel("bits a weight (blocks of 1024 at the left end of a line, of 32 at the right)")
axes.set_ylabel("error / size of the weight")
axes.legend(fontsize=8, frameon=False)
plt.show()
print("NF4:", ", ".join(f"error {error('nf4', size, True):.1%} in blocks of {size}" for size in (1024, 64, 32)))

# %% [markdown]
# The whole lines lie left of the broken ones: fewer bits, the same error. Within a line the error falls slowly; from one table to the
# next it falls by about half. So smaller blocks are no substitute for levels, and weights that are spread as evenly as these could do
# with large blocks. The reason for blocks of 64 is single large weights, which trained models have: the larger a block, the more
# neighbours one of them spoils.
#
# ## The measurement: a model
#
# Errors of weights are not what anybody wants to know. What does the *model* lose? minilora comes with a small language model, a token a
# byte. Its *loss* is the mean of $-\ln p$, where $p$ is the probability that it gave to the byte that came; lower is better. The text was
# held out of its training.

# %%
ids = torch.tensor(list(docs(held_out=True)[: 12 * 257])).view(12, 257)


def loss_of(model):
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits
    return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def packed(name, blocksize, scale="absmax"):
    return quantize_model(byte_model(), QuantConfig(name, blocksize, double_quant=True, scale=scale))


before = loss_of(byte_model())
print(f"32 bits a weight: loss {before:.4f}; a model that knows nothing: {torch.tensor(256.0).log():.4f}")
for name, blocksize in (("int8", 64), ("nf4", 64), ("nf3", 64), ("nf2", 64), ("nf2", 32)):
    after = loss_of(packed(name, blocksize))
    print(f"{name}, blocks of {blocksize}: loss {after:.4f} ({after - before:+.4f})")
print(f"nf2, blocks of 64, the scale of least squared error: {loss_of(packed('nf2', 64, 'mse')):.4f}")

# %% [markdown]
# Eight bits lose nothing that can be seen, and four very little. From there on each bit that is saved costs several times as much as the
# one before; at 2 bits the model is badly damaged. The last line keeps the bits of blocks of 64 and chooses each scale so that the
# squared error of the block is least, instead of taking the largest magnitude: a better choice, and it costs no bit. [Quantization and
# formats](../guides/quantization.md) says what else can be chosen.
#
# ## What would break if
#
# **… the mean of the scales were not taken away?** All scales are positive, so half of the 256 levels, the negative ones, would stand
# idle:

# %%
rest = nested_scales(torch.cat([absmax, -absmax]), "the scales")  # their mean is 0, so nothing is taken away
without = unnested(rest["absmax"], rest["nested_absmax"], rest["nested_offset"])[: len(absmax)]
print(f"mean error of a scale: {off:.2%} with, {((without - absmax) / absmax).abs().mean():.2%} without")

# %% [markdown]
# **… one weight were ten thousand times as large as the others?** Its scale would press 255 other scales toward each other. The line
# below shows it; minilora looks for such a scale, says so, and leaves the scales of this weight in 32 bits.

# %%
absmax[7] *= 10000
kept = nested_scales(absmax, "the scales")
again = unnested(kept["absmax"], kept["nested_absmax"], kept["nested_offset"])
near = torch.arange(256) != 7
print(f"mean error of the 255 scales beside it: {((again - absmax) / absmax)[:256][near].abs().mean():.0%}")
weight[0, 7 * 64] = 10000 * weight.abs().amax()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    stored = quantize(weight, QuantConfig("nf4", blocksize=64, double_quant=True))
print(said[0].message)
print(f"{stored.bits_per_weight} bits a weight")

# %% [markdown]
# ## Exercises
#
# `minilora learn 6` puts the exercises of this lesson into a file of yours, and `minilora learn check 6` grades what you wrote.

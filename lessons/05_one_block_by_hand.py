# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 5 · One block by hand
#
# **The question.** A weight of a language model is a number of 16 or 32 bits. QLoRA keeps it in 4. What happens to 64 such numbers,
# from the first to the last byte, and what comes back?
#
# Four bits can tell sixteen things apart. So each weight becomes the place, 0 to 15, of one of sixteen *levels*, and this place is
# called its *code*. The levels lie between -1 and 1. A *block* is 64 weights in a row; it is divided by its *scale*, its largest
# magnitude (*absmax*), so that all of it lies between -1 and 1, too. With levels $q_0 < q_1 < \dots < q_{15}$ a weight $w$ of a
# block becomes the code $c$ of the nearest one (argmin is the $j$ with the smallest value), and comes back as $\hat w$:
#
# $$c = \operatorname{argmin}_j \left| q_j - \frac{w}{\text{absmax}} \right| , \qquad \hat w = q_c \cdot \text{absmax} .$$
#
# The first half is done once, when the model is loaded. The second half is done again and again: whenever the weight is needed.

# %%
import matplotlib.pyplot as plt
import torch

from minilora.quant.blockwise import quantize
from minilora.quant.codebooks import codebook
from minilora.quant.config import QuantConfig
from minilora.quant.lookup import unpack

torch.manual_seed(0)
weights = torch.randn(64) * 0.02  # what a block of a trained weight looks like: small, around zero
levels = codebook("nf4").table()
for half in (levels[:8], levels[8:]):
    print([round(float(level), 3) for level in half])

# %% [markdown]
# ## Step by step
#
# The scale first. It is the only number of the block that is kept in 32 bits.

# %%
absmax = weights.abs().max()
scaled = weights / absmax
print(f"absmax {absmax:.5f}; the largest value is now {scaled.abs().max():.1f}")

# %% [markdown]
# The nearest level of each value. A table of 64 rows and 16 columns holds all distances; in each row the smallest one wins. (Exactly
# in the middle between two levels, rounding would decide which distance is the smaller. So minilora compares each value with the middles
# $(q_j + q_{j+1}) / 2$ themselves, and a value on a middle gets the lower level. The exercises ask for that.)

# %%
codes = (scaled[:, None] - levels[None, :]).abs().argmin(1)
for weight, value, code in list(zip(weights, scaled, codes, strict=True))[:5]:
    print(
        f"{weight:+.5f}  divided {value:+.4f}  code {code:2d}  level {levels[code]:+.4f}  back {levels[code] * absmax:+.5f}"
    )

# %% [markdown]
# Two codes of four bits share a byte. The first one takes the high half, so it is multiplied by 16. In hexadecimal a byte is written
# with two signs, one for each half (a is 10, b is 11, ... f is 15): the codes can be read off.

# %%
packed = (codes[0::2] * 16 + codes[1::2]).to(torch.uint8)
print("codes", codes[:8].tolist())
print("bytes", " ".join(f"{byte:02x}" for byte in packed[:4].tolist()))
print(f"{len(packed)} bytes of codes and 4 of the scale: {(len(packed) + 4) * 8 / 64} bits a weight")

# %% [markdown]
# And back: take the byte apart, look the levels up, multiply by the scale. `>> 4` moves the high half down, and `& 15` keeps the low
# half; `long()` makes whole numbers that can be used as places (torch would read bytes as a mask of true and false).

# %%
unpacked = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
restored = levels[unpacked] * absmax
error = restored - weights
print(f"the error is {error.norm() / weights.norm():.1%} of the weights, both as lengths of vectors")

# %% [markdown]
# minilora gets the same bytes and the same weights for this block, to the last bit:

# %%
stored = quantize(weights, QuantConfig("nf4", blocksize=64))
print(torch.equal(stored.packed.flatten(), packed), torch.equal(stored.dequantize(torch.float32), restored))

# %% [markdown]
# ## Why these sixteen levels
#
# Trained weights are spread almost like a normal distribution: many near zero, few far from it. The levels of *NF4* follow it: they
# lie close together where there are many weights. *INT4* has even steps, and *FP4* is a small floating-point number. The picture shows
# the levels of each as ticks under the values of many blocks.

# %%
many = torch.randn(4096, 64)
many = (many / many.abs().amax(1, keepdim=True)).flatten()
figure, axes = plt.subplots(figsize=(7, 3.2))
axes.hist(many.numpy(), bins=161, range=(-1, 1), density=True, color="#9db7cc")
for place, name in enumerate(("nf4", "fp4", "int4")):
    table = codebook(name).table()
    axes.plot(table, [-0.14 * (place + 1)] * len(table), "|", markersize=9, markeredgewidth=1.6, label=name.upper())
axes.set(xlabel="weight / absmax of its block", ylabel="density", ylim=(-0.55, None))
axes.set_yticks([tick for tick in axes.get_yticks() if tick >= 0])
axes.legend(loc="upper right", frameon=False)
plt.show()
used = torch.bincount(unpack(quantize(many, QuantConfig("nf4", blocksize=64)).packed, 4, len(many)).long()) / len(many)
print(f"NF4 uses its codes for {used.min():.0%} to {used.max():.0%} of the weights; equal shares would be 6%")

# %% [markdown]
# The measurement: the error of each format on these values, as a share of their size.

# %%
for name in ("nf4", "fp4", "int4"):
    back = quantize(many, QuantConfig(name, blocksize=64)).dequantize(torch.float32)
    print(f"{name:5} {(back - many).norm() / many.norm():.2%}")

# %% [markdown]
# ## What would break if
#
# **… the scale were taken over the whole row?** One weight far larger than the others (an *outlier*) would press them all toward zero,
# where few levels are left for them:

# %%
row = torch.randn(4096) * 0.02
row[7] = 1.0  # one outlier, as they are found in language models
for size in (64, 4096):
    back = quantize(row, QuantConfig("nf4", blocksize=size)).dequantize(torch.float32)
    print(f"blocks of {size:4}: error {(back - row).norm() / row.norm():.1%} in all, "
          f"{(back - row)[64:].norm() / row[64:].norm():.1%} in weights 64 to 4095")  # fmt: skip

# %% [markdown]
# **… the two halves of a byte were swapped?** Every pair of neighbours would change places. The error is then as large as the weights
# themselves, and nothing would complain:

# %%
swapped = torch.stack([packed & 15, packed >> 4], 1).flatten().long()
print(f"{(levels[swapped] * absmax - weights).norm() / weights.norm():.0%}")

# %% [markdown]
# ## Exercises
#
# `minilora learn 5` puts the exercises of this lesson into a file of yours, and `minilora learn check 5` grades what you wrote. Before
# you begin, play with a block: the [block explorer](../explorer.md) shows every number of this page while you drag the weights.

# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # 8 · The kernel
#
# **The question.** How does a GPU multiply with a packed weight, without ever writing the decoded weight down? And what is gained?
#
# A *kernel* is a small program for a GPU, and it is started many times at once. Each of these *programs* has a number, and computes one
# *tile* of the result, a rectangle of it. With tiles of $b_M$ rows and $b_N$ columns, the program of the tile at $(i, j)$ walks along $k$
# in steps of $b_K$:
#
# $$Y_{ij} = \sum_k X_{ik}\, \hat W_{jk}^{\top} , \qquad \hat W_{jk} = \text{levels}[\text{codes}_{jk}] \cdot \text{absmax}_{jk} .$$
#
# It reads a tile of $X$ and a tile of codes, decodes the codes, multiplies, adds, and forgets them. The decoded tile and the sum live in
# *registers*: the numbers that the arithmetic units hold in their hands, so to speak. Only the bytes of $X$, of the codes and of the
# finished $Y$ go through the GPU's memory.
#
# Triton is a language for such kernels inside Python. It also has an *interpreter*, which runs all programs one after the other on an
# ordinary processor, slowly and correctly. It must be asked for before Triton is imported. Where Triton is not installed, this page uses
# a twin of the kernel: the same result, from PyTorch.

# %%
import csv
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import minilora
from minilora import QuantConfig, quantize

os.environ["TRITON_INTERPRET"] = "1"
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
print("Triton's interpreter runs the kernel" if triton else "Triton is not installed: the twin stands in for it")

# %% [markdown]
# ## The kernel, whole
#
# A block of 64 codes is as wide as a step along $k$, so a row of the tile has one scale a step. `who` is for the picture: each program
# writes its number where it writes its results.

# %%
if triton:

    @triton.jit
    def kernel(x, packed, absmax, levels, y, who, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
        program = tl.program_id(0)  # which tile: its rows m of X and n of W
        m = program // (N // BN) * BM + tl.arange(0, BM)
        n = program % (N // BN) * BN + tl.arange(0, BN)
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            rows = tl.load(x + m[:, None] * K + k + tl.arange(0, BK)[None, :])
            codes = tl.load(packed + (n[:, None] * K + k) // 2 + tl.arange(0, BK // 2)[None, :]).to(tl.int32)
            # Decoded in registers: two codes of each byte, their levels, times the scale of the row's block.
            weights = tl.join(tl.load(levels + (codes >> 4)), tl.load(levels + (codes & 15)))
            weights = tl.reshape(weights, (BN, BK)) * tl.load(absmax + (n * K + k) // BK)[:, None]
            total += tl.dot(rows, tl.trans(weights), input_precision="ieee")
        place = m[:, None] * N + n[None, :]
        tl.store(y + place, total)
        tl.store(who + place, program + tl.zeros((BM, BN), tl.int32))


torch.manual_seed(0)
M, N, K, BM, BN, BK = 96, 256, 320, 32, 64, 64
across, programs = N // BN, (M // BM) * (N // BN)
x, weight = torch.randn(M, K), quantize(torch.randn(N, K), QuantConfig("nf4", blocksize=64))
twin_y = x @ weight.dequantize().T
twin_who = torch.arange(programs, dtype=torch.int32).view(-1, across).repeat_interleave(BM, 0).repeat_interleave(BN, 1)
y, who = (torch.full_like(twin_y, torch.nan), torch.full_like(twin_who, -1)) if triton else (twin_y, twin_who)
if triton:
    kernel[(programs,)](x, weight.packed, weight.absmax, weight.book.table(), y, who, N, K, BM=BM, BN=BN, BK=BK)
off = (y - twin_y).norm() / twin_y.norm()
print(f"{programs} programs; off by {off:.0e}; every tile as the twin says: {torch.equal(who, twin_who)}")

# %% [markdown]
# The picture shows what program 6 works with. The third panel is $Y$, each tile with the number of the program that wrote it. The first
# two show the rows of $X$ and the rows of codes that program 6 reads; it takes the light and the dark steps along $k$ one after the
# other.

# %%
figure, panels = plt.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
tile = who == 6
reads = {"X, 32 bits each": tile.any(1), "codes of W, 4 bits each": tile.any(0)}
for axes, (title, read) in zip(panels[:2], reads.items(), strict=True):
    axes.imshow(read[:, None] * (2 + torch.arange(K) // BK % 2), cmap="Blues", vmin=0, vmax=5, aspect="auto")
    axes.set(title=title, xlabel="k", ylabel="row")
panels[2].imshow(tile, cmap="Blues", vmin=0, vmax=2, aspect="auto")
for program in range(programs):
    row, column = (who == program).nonzero().float().mean(0).tolist()
    panels[2].text(column, row, str(program), ha="center", va="center")
panels[2].set(title="Y: which program wrote what", xlabel="row of W", ylabel="row of X")
panels[2].set_xticks(range(0, N, BN))
panels[2].set_yticks(range(0, M, BM))
panels[2].grid(color="#888888")
plt.show()

# %% [markdown]
# ## Registers
#
# Each program reads its rows of $X$ and of $W$ anew. In larger tiles every number that was read is used more often, so larger is better,
# and the registers are the limit. A program is worked on by some hundred *threads*; on NVIDIA's GPUs a thread has at most 255 registers
# of 32 bits. The decoded weights are kept in 16 bits, so two of them share a register.

# %%
for rows, columns, threads in ((32, 64, 128), (128, 128, 256), (256, 128, 256), (256, 256, 256)):
    total, decoded = rows * columns // threads, columns * BK // 2 // threads
    print(f"{rows:3} x {columns:3}, {threads} threads: {total:3} registers for the sum, {decoded} for decoded weights")

# %% [markdown]
# The last tile does not fit. The third is the largest that minilora uses: addresses, scales and the next tile want registers, too.
#
# ## The measurement: bytes against arithmetic
#
# A product of $M$ rows takes $2MNK$ operations (additions and multiplications). Divided by the bytes that must be moved, that is the
# *intensity*. A GPU can do no more operations than its arithmetic units can, and no more than its memory can feed; these two limits
# together are drawn as the *roofline*. NVIDIA's figures for its H200 are 4.8 TB/s and, in bfloat16 (a number of 16 bits, "bf16"), 1,979
# Tflop/s for sparse matrices, which is twice the figure for ordinary ones. The points are times that minilora measured on an H200, for a
# dense weight in bf16 and for its kernel with a packed one, with 1 to many thousand rows. [Kernels](../kernels.md) has more of them.

# %%
N, K, bandwidth, peak = 14336, 4096, 4.8e12, 1979e12 / 2
packed = quantize(torch.randn(1024, 1024), QuantConfig("nf4", double_quant=True))
bits = {"bf16 product": 16, "kernel": packed.bits_per_weight}


def moved(M, bits):
    return N * K * bits / 8 + 2 * M * (N + K)  # the weight, and x and y in bf16


# The repository has this file, an installed package has not: then the roof is drawn without points.
table = Path(minilora.__file__).parents[1] / "benchmarks/results/gpu_nvidia_h200.csv"
lines = table.read_text(encoding="utf-8").splitlines()[1:] if table.exists() else []
measured = [row for row in csv.DictReader(lines) if (row["pass"], row["N"], row["K"]) == ("forward", str(N), str(K))]
figure, axes = plt.subplots(figsize=(7, 4))
reach = torch.logspace(-0.3, 4, 100)
axes.loglog(reach, (reach * bandwidth).clamp(max=peak) / 1e12, color="black", label="roofline, NVIDIA's figures")
for (method, width), colour in zip(bits.items(), ("#c0504d", "#1f4e79"), strict=True):
    rows = [row for row in measured if row["method"] == method]
    intensity = [2 * int(row["M"]) * N * K / moved(int(row["M"]), width) for row in rows]
    axes.plot(
        intensity, [float(row["TFLOPs"]) for row in rows], "o-", color=colour, label=f"{method}, {width:.3g} bits"
    )
    bytes_, at_best = moved(1, width), moved(1, width) / bandwidth
    print(f"{method:12}  one row moves {bytes_ / 1e6:5.1f} MB: {1e6 * at_best:4.1f} µs at NVIDIA's figure")
axes.set(xlabel="intensity (operations a byte)", ylabel="Tflop/s")
axes.legend(frameon=False)
plt.show()

time_of = {(row["method"], row["M"]): f"{float(row['us']):,.0f} µs" for row in measured}
for method in (*bits, "kernel with low rank", "decoded first, with low rank"):
    times = [f"M = {M:4} {time_of.get((method, M), '?'):>8}" for M in ("1", "64", "512", "4096")]
    print(f"{method:29}", *times)

# %% [markdown]
# Read it from left to right. With one row the dense product is bound by the memory: it lies close below the sloped part of the roof. The
# kernel moves a quarter of the bytes, so its point lies further to the right, where the roof is higher. But it stays far below the roof,
# and takes about as long as the dense product: the memory is not what it waits for. Each weight has to be decoded, too. With many rows
# the dense product comes near the flat part, and the kernel reaches less than half of it. So on this card four bits buy memory and not
# time. Where the weights in 16 bits do not fit, that is what counts.
#
# ## What would break if
#
# **… the decoded weight were written down and read again?** That is many times the bytes. The last two rows of the table above compare
# the two ways (with an adapter's part in both). For few rows the bytes decide, and the kernel is faster. For many rows the arithmetic
# decides, and NVIDIA's own product, which cannot decode, is so much faster that decoding first pays. So minilora takes its kernel for up
# to 64 rows on such a card, and decodes first for more.

# %%
first = moved(1, bits["kernel"]) + 2 * 2 * N * K  # 2 bytes a weight written, 2 read
print(f"one row: {moved(1, bits['kernel']) / 1e6:.0f} MB in the kernel, {first / 1e6:.0f} MB if decoded first")

# %% [markdown]
# **… several programs shared one tile, each with a part of $k$, and added to it whenever they were done?** The sum would depend on who
# came first, because rounded additions give another result in another order. A run could then not be repeated. minilora does share long
# sums so, and adds the parts in a fixed order.

# %%
parts = [x[:, k : k + BK] @ weight.dequantize()[:, k : k + BK].T for k in range(0, x.shape[1], BK)]
print(f"numbers that differ, first part first or last: {(sum(parts) != sum(parts[::-1])).float().mean():.0%}")

# %% [markdown]
# ## Exercises
#
# `minilora learn 8` puts the exercises of this lesson into a file of yours, and `minilora learn check 8` grades what you wrote.

"""What the tests of the kernels multiply: values and packed weights that lie between NaN, and how close a result must be."""

import torch

import minilora_kernels as mk
from minilora import QuantConfig
from minilora.linear import cuda
from minilora.quant.blockwise import quantize

CLOSE = 5e-7  # fp32 products, relative to the norm of the result
GUARD = 64  # elements on both sides


def between_nan(values):
    """The same values in memory that has NaN (255 in bytes) on both sides."""
    fill = float("nan") if values.is_floating_point() else 255
    memory = torch.full((values.numel() + 2 * GUARD,), fill, dtype=values.dtype)
    memory[GUARD : GUARD + values.numel()] = values.reshape(-1)
    return memory[GUARD : GUARD + values.numel()].view(values.shape)


def draw(*shape, seed=0, dtype=torch.float32):
    return between_nan(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def packed(shape, book="nf4", blocksize=64, double=False):
    """``(minilora's quantized tensor, the kernels' view of it)`` of a random weight."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.05
    made = quantize(weight, QuantConfig(book, blocksize=blocksize, double_quant=double))
    if made.book.bits == 3:
        return made, None
    inside = cuda.kernel_weight(made)
    parts = {name: between_nan(tensor) for name in ("packed", "absmax", "nested_absmax", "nested_offset")
             if (tensor := getattr(inside, name)) is not None}  # fmt: skip
    return made, mk.Weight(**{**vars(inside), **parts})


def close(got, want):
    assert got.shape == want.shape and not bool(got.isnan().any())
    assert (got.double() - want).norm() <= CLOSE * want.norm()

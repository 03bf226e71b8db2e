"""Weights in GGUF's blocks for tests of several rooms."""

import torch

from minilora.quant.gguf.formats import FORMATS
from minilora.quant.gguf.tensor import GGUFTensor, gguf_tensor

KINDS = tuple(FORMATS)


def random_blocks(kind, rows, blocks, seed=1, scale=None, dtype=torch.float32):
    """Any bytes, but for the fp16 numbers: any finite ones, or ``scale`` times a normal one, or a special ``scale`` as it is."""
    form, draw = FORMATS[kind], torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (rows * blocks, form.nbytes), dtype=torch.uint8, generator=draw)
    for at in form.halves:
        if scale is None:
            packed[:, at + 1] &= 0xFB  # one bit of the exponent is zero: neither infinity nor NaN
        else:
            packed[:, at : at + 2] = torch.tensor([scale], dtype=torch.float16).view(torch.uint8)
    return gguf_tensor(packed, kind, (rows, blocks * form.weights), dtype)


def blocks_of(values, kind):
    """A dense weight in blocks of 32, as the ``gguf`` package packs it."""
    import gguf

    packed = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType[kind])
    return gguf_tensor(torch.from_numpy(packed), kind, values.shape)


def gguf_weight(kind, rows, columns, seed=1, dtype=torch.float32):
    """A weight of the usual size, about 0.05: its bytes are random, its scales small."""
    form = FORMATS[kind]
    middle = {"Q4_0": 0.01, "Q4_1": 0.01, "Q5_0": 0.005, "Q5_1": 0.005, "Q8_0": 7e-4}
    middle |= {"Q2_K": 4e-3, "Q3_K": 1e-3, "Q4_K": 2e-4, "Q5_K": 1e-4, "Q6_K": 4e-5}
    middle = middle[kind]
    found = random_blocks(kind, rows, columns // form.weights, seed, middle, dtype)
    draw = torch.Generator().manual_seed(seed + 1)
    blocks = found.packed.view(-1, form.nbytes)
    for at in form.halves:
        some = (middle * torch.randn(len(blocks), 1, generator=draw)).half()
        blocks[:, at : at + 2] = some.view(torch.uint8)
    assert isinstance(found, GGUFTensor)
    return found

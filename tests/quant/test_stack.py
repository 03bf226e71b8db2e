"""Packed weights of many experts: each is what ``quantize`` makes of it alone, and whole blocks are the bytes that bitsandbytes makes."""

import pytest
import torch
from torch import nn

from minilora.errors import QuantizationError
from minilora.quant.blockwise import quantize
from minilora.quant.config import QuantConfig
from minilora.quant.stack import empty_stack, quantize_stack

FORMATS = ["nf4", "fp4", "nf2", "nf3", "int8"]
SHAPES = {
    "whole": (5, 24, 64),
    "ragged": (5, 21, 33),
    "odd": (3, 7, 5),
    "shorter than a block": (4, 3, 3),
    "one": (1, 8, 96),
}
every_format = pytest.mark.parametrize("name", FORMATS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def draw(shape, dtype=torch.float32):
    """Experts of different sizes, so that a scale of another one would show."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (values * torch.arange(1, shape[0] + 1).view(-1, 1, 1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64])
@every_shape
@every_format
def test_each_expert_is_as_if_alone(name, shape, blocksize, dtype):
    """Filling up with zeros changes neither a scale nor a code: zeros are never the largest of a block."""
    dense, config = draw(shape, dtype), QuantConfig(name, blocksize)
    stack = quantize_stack(dense, config)
    assert stack.shape == dense.shape and stack.dtype == dtype
    assert stack.is_whole == (shape[1] * shape[2] % blocksize == 0)
    for at, matrix in enumerate(dense):
        alone = quantize(matrix, config)
        own = stack.one(at)
        assert own.shape == alone.shape and own.dtype == dtype
        assert torch.equal(own.dequantize(), alone.dequantize())
        assert torch.equal(own.absmax, alone.absmax)
    assert torch.equal(stack.dequantize(), torch.stack([stack.one(at).dequantize() for at in range(len(dense))]))


@pytest.mark.parametrize("blocksize", [32, 64])
@every_shape
@every_format
def test_double_quantization_is_decoded_for_one_as_for_all(name, shape, blocksize):
    stack = quantize_stack(draw(shape), QuantConfig(name, blocksize, double_quant=True))
    scales = stack.stored.scales().view(shape[0], -1)
    for at in range(shape[0]):
        own = stack.one(at)
        assert own.nested_absmax is None and torch.equal(own.absmax, scales[at][: len(own.absmax)])
    flat = stack.stored.dequantize().view(shape[0], -1)[:, : shape[1] * shape[2]]
    assert torch.equal(stack.dequantize().flatten(1), flat)


@pytest.mark.parametrize("blocks", [256, 512, 300, 255], ids=str)
def test_scales_of_whole_nested_blocks(blocks):
    """Where an expert's scales are whole blocks of 256 they are decoded by another line than elsewhere; to the same bits."""
    stack = quantize_stack(draw((3, blocks, 64)), QuantConfig(double_quant=True))
    assert torch.equal(torch.cat([stack.one(at).absmax for at in range(3)]), stack.stored.scales())


@every_format
def test_bits(name):
    bits = {"nf4": 4, "fp4": 4, "nf2": 2, "nf3": 3, "int8": 8}[name]
    single = quantize_stack(draw((4, 64, 64)), QuantConfig(name, 64)).stored
    assert single.bits_per_weight == bits + 32 / 64
    double = quantize_stack(draw((4, 64, 64)), QuantConfig(name, 64, double_quant=True)).stored
    assert bits + 8 / 64 < double.bits_per_weight < bits + 8 / 64 + 0.02
    ragged = quantize_stack(draw((4, 7, 9)), QuantConfig(name, 64)).stored
    assert ragged.nbytes == 4 * (64 * bits // 8 + 4)  # one block each, filled up


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@every_shape
@every_format
def test_empty_storage_has_the_shapes_of_a_full_one(name, shape, double):
    config = QuantConfig(name, double_quant=double)
    full, empty = quantize_stack(draw(shape), config), empty_stack(shape, config, torch.float32)
    assert empty.shape == full.shape and empty.is_whole == full.is_whole and empty.stored.shape == full.stored.shape
    for part in ("packed", "absmax", "nested_absmax", "nested_offset"):
        one, other = getattr(full.stored, part), getattr(empty.stored, part)
        assert (one is None) == (other is None)
        assert one is None or (one.shape == other.shape and one.dtype == other.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["single", "nested"])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_whole_blocks_are_the_bytes_of_bitsandbytes(name, double, dtype):
    parametrize = pytest.importorskip("bitsandbytes.nn.parametrize")
    module = nn.Module()
    module.experts = nn.Parameter(draw((5, 24, 128), dtype), requires_grad=False)
    ours = quantize_stack(module.experts, QuantConfig(name, 64, double_quant=double)).stored
    parametrize.replace_parameter_4bit(module, "experts", compress_statistics=double, quant_type=name, blocksize=64)
    theirs, state = module.parametrizations.experts.original, module.parametrizations.experts[0].quant_state
    assert torch.equal(ours.packed.flatten(), theirs.detach().flatten())
    assert torch.equal(ours.absmax, state.absmax)
    if double:
        assert torch.equal(ours.nested_absmax, state.state2.absmax) and torch.equal(ours.nested_offset[0], state.offset)
    assert torch.equal(ours.dequantize(), module.experts)


@pytest.mark.parametrize(
    ("weight", "config", "words"),
    [
        (torch.ones(3, 4), QuantConfig(), "experts, out, in"),
        (torch.ones(2, 3, 4), QuantConfig(scale="weighted"), "not measured for experts"),
        (torch.ones(2, 3, 4, dtype=torch.float64), QuantConfig(), "float64"),
        (torch.full((2, 3, 4), torch.nan), QuantConfig(), "NaN"),
        (torch.ones(0, 3, 4), QuantConfig(), "empty"),
    ],
    ids=["two dimensions", "weighted", "float64", "NaN", "no expert"],
)
def test_what_is_refused(weight, config, words):
    with pytest.raises(QuantizationError, match=words):
        quantize_stack(weight, config, "mlp.experts.down_proj")


def test_one_expert_is_a_view_of_the_codes():
    stack = quantize_stack(draw((5, 24, 64)))
    storage = stack.stored.packed.untyped_storage().data_ptr()
    assert all(stack.one(at).packed.untyped_storage().data_ptr() == storage for at in range(5))

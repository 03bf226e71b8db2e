"""GGUF's blocks decode to the very bits of ggml's own Python package, and of the formula of a few lines that each is."""

import gguf
import numpy as np
import pytest
import torch

from minilora.errors import QuantizationError
from minilora.quant.gguf.formats import FORMATS, gguf_format
from minilora.quant.gguf.tensor import GGUFTensor, gguf_tensor
from tests import ggml
from tests.gguf_blocks import KINDS, blocks_of, random_blocks

every_kind = pytest.mark.parametrize("kind", KINDS)


def theirs(packed, kind):
    """Decoded by the ``gguf`` package."""
    return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind]))


def bits(values):
    return values.contiguous().view(torch.int32)


@every_kind
def test_sizes_are_those_of_ggml(kind):
    form = FORMATS[kind]
    assert (form.weights, form.nbytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


@every_kind
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 1), (7, 5), (130, 3)])
def test_random_bytes_decode_to_their_bits(kind, rows, blocks):
    weight = random_blocks(kind, rows, blocks)
    want = theirs(weight.packed, kind)
    assert torch.equal(bits(weight.dequantize()), bits(want))
    own = FORMATS[kind].reference(weight.packed.view(-1, FORMATS[kind].nbytes))
    assert own.dtype == torch.float32 and torch.equal(bits(own).view(want.shape), bits(want))


@every_kind
@pytest.mark.parametrize(
    "scale", [0.0, -0.0, 2.0**-24, -(2.0**-24), 2.0**-14, 65504.0, -65504.0, -1.5], ids=lambda value: f"{value:g}"
)
def test_special_scales(kind, scale):
    """Zeros of both signs, the smallest subnormal, the smallest normal and the largest fp16 number, in every scale of a block."""
    weight = random_blocks(kind, 5, 2, scale=scale)
    assert torch.equal(bits(weight.dequantize()), bits(theirs(weight.packed, kind)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if FORMATS[kind].weights == 32])
def test_quantized_weights_come_back_near(kind):
    values = torch.randn(9, 96, generator=torch.Generator().manual_seed(4))
    weight = blocks_of(values, kind)
    assert torch.equal(bits(weight.dequantize()), bits(theirs(weight.packed, kind)))
    step = 2 * values.view(9, 3, 32).abs().amax(2, keepdim=True) / 2 ** int(kind[1])
    assert ((weight.dequantize() - values).view(9, 3, 32).abs() <= step).all()


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_rounded_once(kind, dtype):
    weight = random_blocks(kind, 7, 3, scale=0.01)
    assert torch.equal(weight.dequantize(dtype), weight.dequantize().to(dtype))
    out = torch.empty(weight.shape, dtype=dtype)
    assert weight.dequantize(out=out) is out and torch.equal(out, weight.dequantize(dtype))


@every_kind
def test_long_weights_are_decoded_in_pieces_that_fit_together(kind, monkeypatch):
    weight = random_blocks(kind, 13, 4)
    want = weight.dequantize()
    monkeypatch.setattr("minilora.quant.gguf.tensor._PIECE", 512)
    monkeypatch.setattr("minilora.quant.weight.CHUNK", 1024)
    assert torch.equal(bits(weight.dequantize()), bits(want))


@every_kind
def test_any_range_that_begins_with_a_block(kind):
    weight = random_blocks(kind, 6, 3)
    flat, unit = weight.dequantize().view(-1), weight.unit
    for first, last in ((0, 1), (1, 2), (4, 17), (17, 18)):
        out = torch.empty((last - first) * unit)
        weight.decoder()(first * unit, out)
        assert torch.equal(out, flat[first * unit : last * unit])


@every_kind
def test_rows_in_another_order(kind):
    weight = random_blocks(kind, 9, 2)
    order = torch.tensor([8, 0, 3, 3])
    assert torch.equal(weight.rows(order).dequantize(), weight.dequantize()[order])
    assert torch.equal(weight.rows(slice(2, 7)).dequantize(), weight.dequantize()[2:7])
    assert weight.rows(order).shape == (4, weight.shape[1])


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        *(("Q4_0", 4.5), ("Q4_1", 5), ("Q5_0", 5.5), ("Q5_1", 6), ("Q8_0", 8.5)),
        *(("Q2_K", 2.625), ("Q3_K", 3.4375), ("Q4_K", 4.5), ("Q5_K", 5.5), ("Q6_K", 6.5625)),
    ],
)
def test_bits_and_bytes_are_the_files(kind, wanted):
    weight = random_blocks(kind, 5, 3)
    assert weight.bits_per_weight == FORMATS[kind].bits_per_weight == wanted
    assert weight.nbytes == weight.packed.numel() == 15 * FORMATS[kind].nbytes


@every_kind
def test_results_share_no_memory_with_later_calls(kind):
    weight = random_blocks(kind, 5, 3)
    first = weight.dequantize()
    kept = first.clone()
    random_blocks(kind, 5, 3, seed=9).dequantize()
    assert torch.equal(bits(first), bits(kept))


@pytest.mark.parametrize(
    ("kind", "shape", "size", "words"),
    [
        ("Q4_2", (2, 32), 36, r"GGUF type 'Q4_2' is not decoded here; the closest that are: 'Q4_"),
        ("Q4_0", (2, 48), 54, r"head is \[2, 48\]; wanted rows of whole blocks of 32, as Q4_0 has them"),
        ("Q4_K", (2, 32), 36, r"head is \[2, 32\]; wanted rows of whole blocks of 256"),
        ("Q8_0", (2, 32), 67, r"head has 67 numbers of torch.uint8; wanted 68 bytes for \[2, 32\] in Q8_0"),
        ("Q8_0", (0, 32), 0, r"head is \[0, 32\]"),
    ],
)
def test_bytes_that_do_not_fit_are_refused(kind, shape, size, words):
    with pytest.raises(QuantizationError, match=words):
        gguf_tensor(torch.zeros(size, dtype=torch.uint8), kind, shape, name="head")


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_no_number_is_refused(kind, value):
    weight = random_blocks(kind, 4, 2)
    for at in FORMATS[kind].halves:
        packed = weight.packed.clone()
        packed[2, at : at + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
        with pytest.raises(QuantizationError, match=f"weight: a scale of its {kind} blocks is NaN or infinity"):
            gguf_tensor(packed, kind, weight.shape)


def test_bytes_of_a_file_may_be_read_only_and_flat():
    weight = random_blocks("Q4_1", 3, 2)
    again = gguf_tensor(weight.packed.flatten(), "Q4_1", (3, 64), torch.bfloat16)
    assert isinstance(again, GGUFTensor) and again.dtype == torch.bfloat16
    assert torch.equal(again.dequantize(torch.float32), weight.dequantize())


def test_an_unknown_type_is_named():
    with pytest.raises(QuantizationError, match="GGUF type 3 is not decoded here"):
        gguf_format(3)


def test_the_formats_are_what_numpy_sees():
    """Every byte value at every place of a block: no place is read as another's."""
    for kind, form in FORMATS.items():
        base = random_blocks(kind, 1, 1, seed=5).packed
        packed = base.repeat(form.nbytes, 1)
        packed[np.arange(form.nbytes), np.arange(form.nbytes)] ^= 0x15
        for at in form.halves:  # stay finite
            packed[at + 1] &= 0x7B
        assert torch.equal(
            bits(gguf_tensor(packed, kind, (form.nbytes, form.weights)).dequantize()), bits(theirs(packed, kind))
        )


@every_kind
def test_slack_is_half_a_step_and_what_groups_are_rounded_by(kind):
    """Two values whose codes differ in the lowest bit are a step apart; the scales and minima of a k-quant's groups are whole numbers."""
    form, scale = FORMATS[kind], torch.tensor(-0.01).half().item()
    blocks = random_blocks(kind, 5, 3, scale=scale).packed.view(-1, form.nbytes)
    codes = {
        "Q2_K": (16, 80),
        "Q3_K": (32, 96),
        "Q4_K": (16, 144),
        "Q5_K": (48, 176),
        "Q6_K": (0, 128),
        "Q8_0": (2, 34),
    }
    first, last = codes.get(kind, (form.nbytes - 16, form.nbytes))
    beside = blocks.clone()
    beside[:, first:last] ^= {"Q8_0": 1, "Q2_K": 0x55, "Q3_K": 0x55}.get(kind, 0x11)
    half = (form.reference(blocks) - form.reference(beside)).abs() / 2
    most = {"Q2_K": 3 + 1, "Q3_K": 4, "Q4_K": 15 + 1, "Q5_K": 31 + 1, "Q6_K": 32}
    groups = most.get(kind, 0) * 0.01 / 2
    slack = form.slack(blocks)
    each = slack.repeat_interleave(form.weights // slack.shape[1], 1)
    torch.testing.assert_close(each, half + groups, rtol=1e-3, atol=1e-5)


@every_kind
@pytest.mark.parametrize("weighed", [False, True])
def test_ggml_packs_within_the_slack_and_another_weight_lies_outside(kind, weighed):
    pytest.importorskip("xllamacpp")
    draw, form = torch.Generator().manual_seed(2), FORMATS[kind]
    for tail in (1.0, 3.0):  # normal ones, and with outliers
        weight = 0.05 * torch.randn(24, 512, generator=draw).sign() * torch.randn(24, 512, generator=draw).abs() ** tail
        importance = torch.rand(512, generator=draw) ** 4 + 1e-4 if weighed else None
        blocks = ggml.quantized(weight, kind, importance)
        slack = form.slack(blocks)
        room = slack.repeat_interleave(form.weights // slack.shape[1], 1).view_as(weight) + 2**-7 * weight.abs()
        decoded = form.reference(blocks).view_as(weight)
        assert ((decoded - weight).abs() > room).float().mean() < 0.1
        if tail == 1.0:
            assert ((decoded - weight.roll(1, 0)).abs() > room).float().mean() > (0.55 if kind == "Q2_K" else 0.8)

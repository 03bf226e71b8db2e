"""Quantization against a float64 oracle, its fast loops against their slow twins, and what it refuses."""

import dataclasses
import math
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from minilora.errors import ConfigError, QuantizationError
from minilora.quant.blockwise import quantize, quantize_reference
from minilora.quant.codebooks import NF4, Codebook, codebook, dynamic_map
from minilora.quant.config import QuantConfig
from minilora.quant.lookup import (
    decode_into,
    decode_reference,
    nearest_code,
    nearest_code_reference,
    release_scratch,
    unpack,
)

DOUBLE = QuantConfig(double_quant=True)
LEVELS = np.array(NF4.levels, dtype=np.float32)
MIDPOINTS = (LEVELS[1:] + LEVELS[:-1]) / 2
HALF_GAP = 0.1519036  # half of NF4's widest gap, between -1 and -0.696
# What a Codebook may be: NF4, unsorted with two zeros (as FP4), thresholds close together.
BOOKS = [
    NF4,
    Codebook("unsorted", (0, 0.01, 0.67, 1, 0.33, 0.5, 0.17, 0.25, 0, -0.01, -0.67, -1, -0.33, -0.5, -0.17, -0.25), ""),
    Codebook("close", (-1, -0.5, -0.25, 0, 0.001, 0.002, 0.003, 0.004, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1), ""),
]
every_book = pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.name)

in_range = st.floats(-1, 1, width=32)
# Between the smallest normal scale and the largest, zeros included; what lies below has tests of its own.
normal = st.one_of(st.just(0.0), st.floats(2**-100, 2**100, width=32), st.floats(-(2**100), -(2**-100), width=32))
near_one = st.one_of(st.floats(-2, 2, width=32), st.sampled_from([float(m) for m in MIDPOINTS]))


def vectors(elements, most=200):
    return arrays(np.float32, st.integers(1, most), elements=elements)


def codes_of(quantized):
    pairs = quantized.packed.reshape(-1)
    return torch.stack([pairs >> 4, pairs & 15], -1).flatten()[: quantized.shape.numel()].numpy()


def scale_of_each(quantized):
    return quantized.scales().repeat_interleave(quantized.blocksize)[: quantized.shape.numel()].numpy()


def oracle(scaled):
    """The number of thresholds strictly below: the nearest level, a tie to the lower one."""
    return (np.float64(scaled)[:, None] > np.float64(MIDPOINTS)).sum(1)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@given(vectors(st.one_of(normal, near_one)))
def test_codes_are_the_nearest_levels(values):
    quantized = quantize(torch.from_numpy(values))
    scale = np.float64(scale_of_each(quantized))
    scaled = np.divide(np.float64(values), scale, out=np.zeros(len(values)), where=scale > 0)
    distances = np.abs(scaled[:, None] - np.float64(LEVELS))
    chosen = np.take_along_axis(distances, codes_of(quantized)[:, None].astype(int), 1)[:, 0]
    assert (chosen <= distances.min(1) + 2e-7).all()


@pytest.mark.parametrize("count", [64, 45], ids=["whole block", "ragged tail"])
@pytest.mark.parametrize("scale", [1.0, -1.0, 2.0**-20])
def test_thresholds_and_their_neighbours(count, scale):
    """With a power of two as scale the scaled values are exact; a threshold itself goes to the lower level."""
    values = np.concatenate([np.nextafter(MIDPOINTS, -2), MIDPOINTS, np.nextafter(MIDPOINTS, 2)])[: count - 1]
    block = np.full(count, np.float32(abs(scale)))
    block[0] = scale
    block[1 : 1 + len(values)] = values * np.float32(abs(scale))
    got = codes_of(quantize(torch.from_numpy(block)))
    low = np.arange(15)
    want = np.concatenate([low, low, low + 1])[: count - 1]
    assert got[0] == (15 if scale > 0 else 0)
    assert (got[1 : 1 + len(want)] == want).all()


@given(vectors(st.one_of(normal, near_one), most=64))
def test_codes_are_monotone_within_a_block(values):
    order = np.argsort(values, kind="stable")
    assert (np.diff(codes_of(quantize(torch.from_numpy(values)))[order].astype(int)) >= 0).all()


@given(vectors(normal))
def test_error_is_at_most_half_the_widest_gap(values):
    quantized = quantize(torch.from_numpy(values))
    error = np.abs(np.float64(quantized.dequantize().numpy()) - values)
    assert (error <= np.float64(scale_of_each(quantized)) * (HALF_GAP + 1e-6)).all()


@given(vectors(st.floats(-8, 8, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6)), st.integers(-60, 60))
def test_scaling_by_a_power_of_two_is_exact(values, power):
    small, large = quantize(torch.from_numpy(values)), quantize(torch.from_numpy(np.ldexp(values, power)))
    assert torch.equal(small.packed, large.packed)
    assert torch.equal(torch.ldexp(small.dequantize(), torch.tensor(power)), large.dequantize())


@pytest.mark.filterwarnings("ignore:.*stay in fp32:UserWarning")
@given(vectors(normal), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_quantizing_again_changes_no_code(values, dtype, double):
    config = QuantConfig(double_quant=double)
    once = quantize(torch.from_numpy(values).to(dtype), QuantConfig())
    again = quantize(once.dequantize(), config)
    assert torch.equal(once.packed, again.packed)
    if not double:
        assert torch.equal(once.scales(), again.scales())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("shape", [(1,), (63,), (64,), (65,), (7, 200), (5, 33), (3, 5, 30), (1, 1), (9000,)], ids=str)
def test_shape_dtype_and_number_of_scales_are_exact(shape, blocksize, dtype):
    weight = gaussian(*shape, dtype=dtype)
    quantized = quantize(weight, QuantConfig(blocksize=blocksize))
    blocks = -(-weight.numel() // blocksize)
    assert quantized.absmax.shape == (blocks,) and quantized.absmax.dtype == torch.float32
    assert quantized.packed.numel() == (weight.numel() + 1) // 2 and quantized.packed.dtype == torch.uint8
    if len(shape) > 1 and shape[-1] % 2 == 0:
        assert quantized.packed.shape == (*shape[:-1], shape[-1] // 2)
    whole = quantized.dequantize()
    assert whole.shape == weight.shape and whole.dtype == dtype
    assert quantized.dequantize(torch.float64).dtype == torch.float64
    assert (whole.float() - weight.float()).abs().max() <= 0.1525 * weight.float().abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dequantizing_rounds_once(dtype):
    quantized = quantize(gaussian(50, 33).to(dtype))
    assert torch.equal(quantized.dequantize(), quantized.dequantize(torch.float32).to(dtype))
    levels = codebook("nf4").table()[torch.from_numpy(codes_of(quantized)).long()]
    exact = (levels * torch.from_numpy(scale_of_each(quantized))).view(50, 33)
    assert torch.equal(quantized.dequantize(torch.float32), exact)


def test_large_tensors_are_worked_on_in_pieces_that_fit_together():
    weight = gaussian(3, 130_001)
    whole, rows = quantize(weight), weight.reshape(-1)
    cut = 64 * 1024
    parts = [quantize(rows[start : start + cut]) for start in range(0, len(rows), cut)]
    assert torch.equal(whole.scales(), torch.cat([part.scales() for part in parts]))
    assert torch.equal(whole.dequantize().reshape(-1), torch.cat([part.dequantize() for part in parts]))


@pytest.mark.parametrize("config", [QuantConfig(), DOUBLE], ids=["single", "double"])
def test_non_contiguous_weights_quantize_as_their_copies(config):
    weight = gaussian(40, 66)
    for view in (weight.t(), weight[:, ::2], weight[3:, 1:-2], weight[:1].expand(5, -1)):
        got, want = quantize(view, config), quantize(view.contiguous(), config)
        assert torch.equal(got.packed, want.packed) and torch.equal(got.dequantize(), want.dequantize())


def test_bits_per_weight_single():
    assert quantize(gaussian(1024, 1024)).bits_per_weight == 4.5
    assert quantize(gaussian(64, 32), QuantConfig(blocksize=128)).bits_per_weight == 4.25


def test_bits_per_weight_double():
    quantized = quantize(gaussian(1024, 1024), DOUBLE)
    blocks = 2**20 // 64
    assert quantized.nbytes == 2**19 + blocks + 4 * (blocks // 256) + 4
    assert quantized.bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=4e-5)


@pytest.mark.parametrize(("count", "nested"), [(64, 1), (64 * 256, 1), (64 * 256 + 1, 2)])
def test_double_quantization_keeps_scales_within_its_own_step(count, nested):
    weight = gaussian(count)
    single, double = quantize(weight), quantize(weight, DOUBLE)
    assert double.absmax.dtype == torch.uint8 and double.nested_absmax.shape == (nested,)
    assert double.nested_offset.shape == (1,)
    assert torch.equal(single.packed, double.packed)
    spread = double.nested_absmax.repeat_interleave(256)[: single.absmax.numel()]
    widest = dynamic_map().diff().max()
    assert ((double.scales() - single.scales()).abs() <= spread * widest / 2 + 1e-7).all()


@pytest.mark.parametrize("config", [QuantConfig(), DOUBLE], ids=["single", "double"])
@pytest.mark.parametrize("shape", [(64,), (3,), (4, 100)], ids=str)
def test_zeros_stay_zeros(config, shape):
    quantized = quantize(torch.zeros(shape), config)
    assert (codes_of(quantized) == 7).all()
    assert torch.equal(quantized.dequantize(), torch.zeros(shape))


def test_a_zero_block_among_others_stays_zero():
    weight = gaussian(4, 64)
    weight[2] = 0
    assert torch.equal(quantize(weight).dequantize()[2], torch.zeros(64))


@given(vectors(st.floats(-(2**-126), 2**-126, width=32), most=130))
def test_denormals_stay_finite_and_small(values):
    result = quantize(torch.from_numpy(values)).dequantize().numpy()
    assert np.isfinite(result).all() and (np.abs(result) <= 1e-37).all()


@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38])
def test_extreme_scales_keep_the_error_bound(size):
    weight = gaussian(130)
    weight = weight / weight.abs().max() * size
    assert ((quantize(weight).dequantize().double() - weight.double()).abs() <= 0.152 * size).all()


def with_outlier(times, blocks=512, at=300):
    """Gaussian weights of which one is ``times`` the largest magnitude of its block."""
    weight = gaussian(blocks * 64)
    block = weight[at * 64 : at * 64 + 64]
    block[7] = block.abs().max() * times
    return weight.view(blocks * 2, 32)


def errors_of_the_rest(weight, config, at=300):
    """Relative error of all rows but the outlier's."""
    ours = quantize(weight, config).dequantize()
    keep = torch.ones(len(weight), dtype=torch.bool)
    keep[2 * at : 2 * at + 2] = False
    return float((ours - weight)[keep].norm() / weight[keep].norm())


@pytest.mark.parametrize("times", [100, 1666, 1e6])
def test_one_scale_far_above_the_others_keeps_that_tensors_scales_in_fp32_and_says_so(times):
    weight = with_outlier(times)
    with pytest.warns(UserWarning, match=r"layer 3: a scale is [\d.e+]+ times as large .* stay in fp32"):
        found = quantize(weight, DOUBLE, "layer 3")
    single = quantize(weight, QuantConfig())
    assert found.nested_absmax is None and torch.equal(found.scales(), single.scales())
    assert torch.equal(found.packed, single.packed) and found.bits_per_weight == 4.5


@pytest.mark.parametrize("times", [100, 1666, 1e6])
@pytest.mark.filterwarnings("ignore:.*stay in fp32:UserWarning")
def test_an_outlier_costs_the_other_rows_nothing(times):
    assert errors_of_the_rest(with_outlier(times), DOUBLE) == pytest.approx(
        errors_of_the_rest(gaussian(512 * 64).view(1024, 32), QuantConfig()), rel=0.01
    )


def test_without_it_an_outlier_would_cost_the_other_rows_all(monkeypatch):
    """What the rule is for: the numbers that bitsandbytes gives."""
    monkeypatch.setattr("minilora.quant.nested._OUTLIER", float("inf"))
    assert errors_of_the_rest(with_outlier(1e6), DOUBLE) > 1 > 0.12 > errors_of_the_rest(with_outlier(3), DOUBLE)


@pytest.mark.parametrize("times", [1, 5, 20])
def test_what_trained_weights_have_is_no_outlier(times):
    found = quantize(with_outlier(times), DOUBLE)
    assert found.nested_absmax is not None and found.bits_per_weight < 4.14


@pytest.mark.parametrize("zeros", [0.1, 0.9, 0.999, 1.0])
def test_blocks_of_zeros_are_not_what_others_are_measured_by(zeros):
    weight = gaussian(512 * 64).view(512, 64)
    weight[: round(zeros * 512)] = 0
    found = quantize(weight, DOUBLE)
    assert found.nested_absmax is not None
    assert torch.equal(found.dequantize()[: round(zeros * 512)], torch.zeros(round(zeros * 512), 64))


tiny, half_most = st.floats(-(2**-126), 2**-126, width=32), torch.finfo(torch.float16).max
odd = st.one_of(
    st.just(0.0), tiny, st.sampled_from([half_most, -half_most, 1e-8, -3e38, 3e38]), st.floats(-3, 3, width=32)
)


@pytest.mark.filterwarnings("ignore:.*stay in fp32:UserWarning")
@given(
    vectors(odd, most=20_000),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([QuantConfig(), DOUBLE, QuantConfig("fp4", double_quant=True), QuantConfig(blocksize=128)]),
)
def test_odd_weights_stay_finite_and_near_or_are_refused(values, dtype, config):
    limit = torch.finfo(dtype).max
    weight = torch.from_numpy(values).clamp(-limit, limit).to(dtype)
    try:
        found = quantize(weight, config, "odd one")
    except QuantizationError:
        found = None
    if found is None:  # the mean of these scales overflows, which double quantization cannot do without
        single = quantize(weight, dataclasses.replace(config, double_quant=False))
        assert config.double_quant and not math.isfinite(float(single.scales().mean()))
        return
    scales, back = found.scales(), found.dequantize(torch.float32)
    assert back.shape == weight.shape and found.dequantize().dtype == dtype
    assert bool(torch.isfinite(back).all()) and bool(torch.isfinite(scales).all())
    if not config.double_quant:
        each = scale_of_each(found)
        error = np.abs(back.numpy().astype(np.float64) - weight.float().numpy())
        assert (error <= HALF_GAP * 1.0001 * each + 1e-38).all()


def test_double_quantization_of_huge_scales_is_finite_or_refused():
    weight = torch.full((64, 64), 3e38)
    try:
        quantized = quantize(weight, DOUBLE, "big.weight")
    except QuantizationError as error:
        assert "big.weight" in str(error)  # noqa: PT017
    else:
        assert quantized.dequantize().isfinite().all()


@pytest.mark.parametrize("position", [0, 70, 129], ids=["block", "second block", "tail"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [QuantConfig(), DOUBLE], ids=["single", "double"])
def test_one_bad_value_is_refused(position, value, dtype, config):
    weight = gaussian(130).to(dtype)
    weight[position] = value
    with pytest.raises(QuantizationError, match=r"layers\.3\.weight holds NaN or infinity"):
        quantize(weight, config, "layers.3.weight")


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.ones(8, dtype=torch.float64), "layers.3.weight is torch.float64; wanted float32"),
        (torch.ones(8, dtype=torch.int8), "layers.3.weight is torch.int8; wanted float32"),
        (torch.ones(8, dtype=torch.bool), "layers.3.weight is torch.bool; wanted float32"),
        (torch.empty(0), "layers.3.weight is empty"),
        (torch.empty(4, 0), "layers.3.weight is empty"),
    ],
)
def test_what_cannot_be_quantized_is_refused_by_name(weight, words):
    with pytest.raises(QuantizationError, match=words):
        quantize(weight, name="layers.3.weight")


def test_unknown_format_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"format='nf5' is not known; .*'nf4'"):
        QuantConfig(format="nf5")


@pytest.mark.parametrize(
    ("levels", "words"),
    [((0.0, 1.0), "2 levels"), ((-1,) * 15 + (1.5,), "outside"), ((-1,) * 15 + (float("nan"),), "outside")],
)
def test_impossible_codebooks_are_refused(levels, words):
    with pytest.raises(QuantizationError, match=f"'mine'.*{words}"):
        Codebook("mine", levels, "")


@every_book
@given(values=vectors(st.one_of(in_range, st.sampled_from([float(m) for m in MIDPOINTS])), most=70))
def test_fast_search_equals_the_slow_one(book, values):
    thresholds = book.thresholds()[0].numpy()
    edges = [np.nextafter(thresholds, np.float32(-2)), thresholds, np.nextafter(thresholds, np.float32(2))]
    scaled = torch.from_numpy(np.concatenate([values, *edges, np.float32([-1, -0.0, 1])]).clip(-1, 1))
    got = nearest_code(scaled, book)
    assert got.dtype == torch.uint8 and torch.equal(got, nearest_code_reference(scaled, book))


def test_slow_search_is_the_oracle():
    scaled = np.concatenate([np.linspace(-1, 1, 4001, dtype=np.float32), MIDPOINTS])
    assert (nearest_code_reference(torch.from_numpy(scaled), NF4).numpy() == oracle(scaled)).all()


@pytest.mark.parametrize("shape", [(6, 7), (0,), (2, 3, 4)], ids=str)
def test_fast_search_keeps_the_shape(shape):
    scaled = torch.rand(shape) * 2 - 1
    assert torch.equal(nearest_code(scaled, NF4), nearest_code_reference(scaled, NF4))


@every_book
@pytest.mark.parametrize("count", [1, 2, 7, 64, 129])
def test_fast_decoding_equals_the_slow_one(book, count):
    codes = torch.randint(0, len(book.levels), (2, (count + 1) // 2), generator=torch.Generator().manual_seed(count))
    packed = (codes[0] * 16 + codes[1]).to(torch.uint8)
    out = torch.full((count,), float("nan"))
    decode_into(packed, book, out)
    assert torch.equal(out, decode_reference(packed, book, count))


def test_every_byte_decodes_to_two_levels_high_nibble_first():
    packed = torch.arange(256, dtype=torch.uint8)
    want = [level for high in NF4.levels for low in NF4.levels for level in (high, low)]
    assert decode_reference(packed, NF4, 512).tolist() == torch.tensor(want).tolist()


def test_nf4_is_derived_from_the_normal_distribution():
    """Dettmers et al. 2023, section 3: normal quantiles, 8 above zero and 7 below, divided by the largest."""
    ppf = pytest.importorskip("scipy.stats").norm.ppf
    above, below = (ppf(np.linspace(0.9677083, 0.5, n)[:-1]) for n in (9, 8))
    levels = np.sort(np.concatenate([above, -below, [0.0]])) / above.max()
    assert np.abs(levels - np.array(NF4.levels)).max() < 2e-7
    assert len(NF4.levels) == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_share_no_memory_with_later_calls(dtype):
    weights = [gaussian(30, 66, seed=seed, dtype=dtype) for seed in (1, 2)]
    first = quantize(weights[0])
    packed, dense = first.packed.clone(), first.dequantize()
    kept = dense.clone()
    quantize(weights[1]).dequantize()
    assert torch.equal(first.packed, packed) and torch.equal(dense, kept)
    assert first.dequantize().data_ptr() != dense.data_ptr()


def test_released_scratch_comes_back():
    weight = gaussian(30, 66)
    before = quantize(weight).dequantize()
    release_scratch()
    assert torch.equal(quantize(weight).dequantize(), before)


def test_threads_do_not_mix_their_buffers():
    weights = [gaussian(97, 131, seed=seed) for seed in range(4)]
    want = [quantize(weight).dequantize(torch.bfloat16) for weight in weights]
    start, wrong = threading.Barrier(len(weights)), []

    def work(number):
        start.wait()
        for _ in range(40):
            if not torch.equal(quantize(weights[number]).dequantize(torch.bfloat16), want[number]):
                wrong.append(number)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(weights))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dequantize_writes_into_a_given_tensor(dtype):
    packed, room = quantize(torch.randn(70, 33)), torch.empty(70, 33, dtype=dtype)
    assert packed.dequantize(out=room) is room
    assert torch.equal(room, packed.dequantize(dtype))


@pytest.mark.parametrize("room", [torch.empty(33, 70), torch.empty(33, 70).t(), torch.empty(70, 33, device="meta")])
def test_dequantize_refuses_a_tensor_that_does_not_fit(room):
    with pytest.raises(QuantizationError, match=r"wanted a contiguous \(70, 33\) on cpu"):
        quantize(torch.randn(70, 33)).dequantize(out=room)


@pytest.mark.parametrize("name", ["nf4", "fp4", "nf3", "nf2", "int8"])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_the_idea_of_a_few_lines_defines_it(name, blocksize):
    weight = torch.randn(24, 256, dtype=torch.bfloat16)
    weight.view(-1)[:blocksize] = 0.0
    codes, absmax = quantize_reference(weight, codebook(name), blocksize)
    found = quantize(weight, QuantConfig(name, blocksize=blocksize))
    assert torch.equal(found.absmax, absmax) and torch.equal(
        unpack(found.packed.flatten(), found.book.bits, len(codes)), codes
    )

"""Every Triton kernel in the interpreter against its reference in float64.

Inputs lie between NaN, so that reading beyond them shows; results are allocated as NaN between guards, so that what is not written
shows, and what is written beyond them too. The interpreter's bf16 arithmetic is wrong, so products are taken in fp32; what bf16 adds (the
table in two byte planes, the assembly) is tested in ``test_kernels_lookup.py``, and the machine code in ``test_kernels_aot.py``.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton, which is there for Linux only: pip install triton")

import minilora_kernels as mk
from minilora import QuantConfig
from minilora.errors import MissingPackageError, QuantizationError
from minilora.linear import cuda
from minilora.quant.blockwise import quantize
from minilora.quant.codebooks import CODEBOOKS
from minilora_kernels import dequant, launch
from minilora_kernels.launch import Tile
from minilora_kernels.partials import total
from tests.kernels.material import close, draw, packed

BOOKS = [name for name, book in CODEBOOKS.items() if book.bits in (2, 4)]
pytestmark = pytest.mark.usefixtures("poisoned")


# --- dequant ---


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("book", BOOKS)
def test_dequant_of_every_codebook_equals_minilora_to_the_bit(book, double):
    made, w = packed((33, 77), book, 32, double)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(mk.nf4_dequant(w, dtype), made.dequantize(dtype))
        assert torch.equal(mk.nf4_dequant(w, dtype), mk.dequant_reference(w, dtype))


@pytest.mark.parametrize(
    ("shape", "blocksize"), [((1, 1), 64), ((7, 200), 64), ((130, 65), 128), ((3, 4096), 4096), ((64, 320), 32)]
)
def test_dequant_of_odd_sizes(shape, blocksize):
    made, w = packed(shape, blocksize=blocksize, double=True)
    assert torch.equal(mk.nf4_dequant(w, torch.float32), made.dequantize(torch.float32))


def test_dequant_beyond_one_group_of_nested_scales():
    made, w = packed((300, 64), blocksize=32, double=True)
    assert w.nested_absmax.numel() == 3
    assert torch.equal(mk.nf4_dequant(w, torch.float32), made.dequantize(torch.float32))


def test_rows_are_the_rows_and_must_begin_with_a_block():
    made, w = packed((48, 80))
    dense, step = made.dequantize(torch.float32), dequant.row_step(w)
    assert step == 4 and torch.equal(mk.nf4_dequant(w, torch.float32, (step, 30)), dense[step:30])
    with pytest.raises(ValueError, match="multiple of the blocksize 64"):
        mk.nf4_dequant(w, torch.float32, (1, 30))


def test_slices_go_through_one_small_buffer(monkeypatch):
    made, w = packed((48, 80), double=True)
    monkeypatch.setattr(dequant, "BUFFER", 80 * 4 * 4 * 3)  # twelve rows
    slices = [
        (first, last, rows.clone(), rows.data_ptr()) for first, last, rows in dequant.row_slices(w, torch.float32)
    ]
    assert [s[:2] for s in slices] == [(0, 12), (12, 24), (24, 36), (36, 48)] and len({s[3] for s in slices}) == 1
    assert torch.equal(torch.cat([s[2] for s in slices]), made.dequantize(torch.float32))


# --- products ---

SMALL = [(1, 64, 64), (5, 130, 128), (33, 64, 192), (70, 192, 320)]  # M, N, K


@pytest.mark.parametrize("size", SMALL, ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_linear(size, double):
    m, n, k = size
    _, w = packed((n, k), double=double)
    x, xa, b, bias = draw(m, k), draw(m, 5, seed=1), draw(n, 5, seed=2), draw(n, seed=3)
    close(mk.nf4_linear(x, w, path="fused"), mk.linear_reference(x.double(), w))
    close(mk.nf4_linear(x, w, xa, b, bias, path="fused"), mk.linear_reference(x.double(), w, xa.double(), b, bias))


@pytest.mark.parametrize("size", [(1, 64, 64), (5, 128, 192), (33, 64, 128), (70, 192, 320)], ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_dgrad(size, double):
    m, n, k = size
    _, w = packed((n, k), double=double)
    dy, dyb, a = draw(m, n), draw(m, 5, seed=1), draw(5, k, seed=2)
    tile = Tile(32, 64, 64, 4, 1)
    close(mk.nf4_dgrad(dy, w, path="fused", tile=tile), mk.dgrad_reference(dy.double(), w))
    close(mk.nf4_dgrad(dy, w, dyb, a, path="fused", tile=tile), mk.dgrad_reference(dy.double(), w, dyb.double(), a))


@pytest.mark.parametrize("size", SMALL[:3], ids=str)
@pytest.mark.parametrize("parts", [1, 4])
def test_gemv(size, parts):
    m, n, k = size
    _, w = packed((n, k), double=True)
    x, xa, b, bias = draw(m, k), draw(m, 5, seed=1), draw(n, 5, seed=2), draw(n, seed=3)
    assert mk.gemv_fits(w, m)
    close(mk.nf4_gemv(x, w, parts=parts), mk.gemv_reference(x.double(), w))
    close(mk.nf4_gemv(x, w, xa, b, bias, parts), mk.gemv_reference(x.double(), w, xa.double(), b, bias))


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_products_with_every_codebook_and_blocksize(book, blocksize):
    _, w = packed((64, 256), book, blocksize, double=True)
    x, dy = draw(17, 256), draw(17, 64)
    close(mk.nf4_linear(x, w, path="fused"), mk.linear_reference(x.double(), w))
    close(mk.nf4_dgrad(dy, w, path="fused"), mk.dgrad_reference(dy.double(), w))
    if blocksize > 32:
        close(mk.nf4_gemv(x, w), mk.gemv_reference(x.double(), w))
    else:
        assert not mk.gemv_fits(w, 17)


@pytest.mark.parametrize("tile", [Tile(128, 128, 64, 8, 3), Tile(256, 128, 64, 8, 3)], ids=str)
def test_linear_with_the_tiles_that_are_shipped(tile):
    _, w = packed((200, 256), double=True)
    x, xa, b = draw(300, 256), draw(300, 16, seed=1), draw(200, 16, seed=2)
    close(mk.nf4_linear(x, w, xa, b, tile=tile), mk.linear_reference(x.double(), w, xa.double(), b))


@pytest.mark.parametrize("tile", [Tile(64, 64, 64, 4, 4), Tile(128, 64, 128, 8, 3), Tile(256, 64, 128, 8, 3)], ids=str)
def test_dgrad_with_the_tiles_that_are_shipped(tile):
    _, w = packed((192, 256), double=True)
    dy, dyb, a = draw(300, 192), draw(300, 16, seed=1), draw(16, 256, seed=2)
    close(mk.nf4_dgrad(dy, w, dyb, a, tile=tile), mk.dgrad_reference(dy.double(), w, dyb.double(), a))


@pytest.mark.parametrize("r", [1, 16, 33, 64, 65])
def test_ranks_are_padded_and_large_ones_multiplied_apart(r):
    _, w = packed((64, 128))
    x, xa, b, a, dy = draw(9, 128), draw(9, r, seed=1), draw(64, r, seed=2), draw(r, 128, seed=3), draw(9, 64)
    assert (launch.padded_rank(r) is None) == (r > 64)
    close(mk.nf4_linear(x, w, xa, b), mk.linear_reference(x.double(), w, xa.double(), b))
    close(mk.nf4_gemv(x, w, xa, b), mk.linear_reference(x.double(), w, xa.double(), b))
    close(mk.nf4_dgrad(dy, w, xa, a), mk.dgrad_reference(dy.double(), w, xa.double(), a))


@pytest.mark.parametrize("shape", [(48, 80), (7, 33), (130, 65)], ids=str)
def test_shapes_that_do_not_divide_are_decoded_first(shape, monkeypatch):
    monkeypatch.setattr(dequant, "BUFFER", 1)
    _, w = packed(shape, double=True)
    n, k = shape
    x, xa, b, bias, dy, a = draw(6, k), draw(6, 3, seed=1), draw(n, 3, seed=2), draw(n), draw(6, n), draw(3, k)
    assert dequant.row_step(w) < n or n == 7
    close(mk.nf4_linear(x, w, xa, b, bias), mk.linear_reference(x.double(), w, xa.double(), b, bias))
    close(mk.nf4_dgrad(dy, w, xa, a), mk.dgrad_reference(dy.double(), w, xa.double(), a))
    for call in (lambda: mk.nf4_linear(x, w, path="fused"), lambda: mk.nf4_dgrad(dy, w, path="fused")):
        with pytest.raises(ValueError, match="wanted whole tiles"):
            call()


def test_both_paths_agree():
    _, w = packed((64, 128), double=True)
    x, dy = draw(9, 128), draw(9, 64)
    close(mk.nf4_linear(x, w, path="dequant"), mk.nf4_linear(x, w, path="fused").double())
    close(mk.nf4_dgrad(dy, w, path="dequant"), mk.nf4_dgrad(dy, w, path="fused").double())


def test_many_rows_are_decoded_first_where_that_was_measured_to_be_faster(monkeypatch):
    _, w = packed((64, 128), double=True)
    monkeypatch.setitem(launch.FUSED_ROWS, "cpu", (8, 2))
    real, decoded = dequant.nf4_dequant, []
    monkeypatch.setattr(dequant, "nf4_dequant", lambda w, *rest: decoded.append(1) or real(w, *rest))
    for rows, forward, first in [(8, True, False), (9, True, True), (2, False, False), (3, False, True)]:
        decoded.clear()
        x = draw(rows, 128 if forward else 64)
        got = (mk.nf4_linear if forward else mk.nf4_dgrad)(x, w)
        close(got, (mk.linear_reference if forward else mk.dgrad_reference)(x.double(), w))
        assert bool(decoded) == first


def test_fp16_goes_through_with_its_own_rounding():
    _, w = packed((64, 128), double=True)
    x = draw(9, 128, dtype=torch.float16)
    want = mk.linear_reference(x.double(), w)
    for got in (mk.nf4_linear(x, w), mk.nf4_gemv(x, w)):
        assert got.dtype == torch.float16 and (got.double() - want).norm() < 1e-3 * want.norm()


def test_no_rows():
    _, w = packed((64, 128))
    assert mk.nf4_linear(draw(0, 128), w).shape == (0, 64) and mk.nf4_dgrad(draw(0, 64), w).shape == (0, 128)


def test_inputs_need_not_be_contiguous():
    _, w = packed((64, 128))
    x, dy = draw(128, 9).T, draw(64, 9).T
    close(mk.nf4_linear(x, w), mk.linear_reference(x.double(), w))
    close(mk.nf4_gemv(x, w), mk.linear_reference(x.double(), w))
    close(mk.nf4_dgrad(dy, w), mk.dgrad_reference(dy.double(), w))


def test_a_result_is_the_same_on_every_run():
    _, w = packed((64, 512))
    x = draw(3, 512)
    assert torch.equal(mk.nf4_gemv(x, w, parts=8), mk.nf4_gemv(x, w, parts=8))


# --- thin products ---


@pytest.mark.parametrize(
    "size", [(70, 130, 100, 5), (150, 64, 256, 16), (33, 64, 64, 40), (1, 3, 5, 1), (9, 64, 64, 65)], ids=str
)
@pytest.mark.parametrize("parts", [1, 4])
def test_low_rank(size, parts, monkeypatch):
    from minilora_kernels import lowrank

    m, n, k, r = size
    monkeypatch.setattr(lowrank, "splits", lambda arch, programs, most: parts)
    x, a, b, dy, xa = draw(m, k), draw(r, k, seed=1), draw(n, r, seed=2), draw(m, n, seed=3), draw(m, r, seed=4)
    close(mk.lora_down(x, a, 0.7), mk.lora_down_reference(x.double(), a, 0.7))
    dyb, db = mk.lora_bwd_b(dy, b, xa, 0.7)
    want_dyb, want_db = mk.lora_bwd_b_reference(dy.double(), b, xa, 0.7)
    close(dyb, want_dyb)
    close(db, want_db)
    close(mk.lora_bwd_a(xa, x), mk.lora_bwd_a_reference(xa, x.double()))


def test_the_backward_of_a_whole_layer_is_autograd_s():
    made, w = packed((64, 128), double=True)
    x, a, b, dy, scale = draw(20, 128), draw(4, 128, seed=1) * 0.1, draw(64, 4, seed=2) * 0.1, draw(20, 64, seed=3), 2.5
    leaves = [t.double().requires_grad_() for t in (x, a, b)]
    y = leaves[0] @ made.dequantize(torch.float64).T + scale * (leaves[0] @ leaves[1].T) @ leaves[2].T
    dx, da, db = torch.autograd.grad(y, leaves, dy.double())
    xa = mk.lora_down(x, a, scale)
    close(mk.nf4_linear(x, w, xa, b), y.detach())
    dyb, got_db = mk.lora_bwd_b(dy, b, xa, scale)
    close(mk.nf4_dgrad(dy, w, dyb, a), dx)
    close(got_db, db)
    close(mk.lora_bwd_a(dyb, x), da)


def test_parts_are_added_with_scale_and_bias():
    parts, bias = draw(3, 5, 7), draw(7, seed=1)
    close(total(parts, torch.float32, 0.3, bias), 0.3 * parts.double().sum(0) + bias)


# --- quantize ---


@pytest.mark.parametrize("book", [name for name in BOOKS if not CODEBOOKS[name].signed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantize_writes_minilora_s_bytes(book, dtype):
    for shape, blocksize in [((7, 33), 64), ((5, 320), 32), ((3, 64), 64), ((2, 3), 128)]:
        weight = draw(*shape, dtype=dtype) * 0.1
        want = quantize(weight, QuantConfig(book, blocksize=blocksize, double_quant=False))
        got = mk.nf4_quantize(weight, CODEBOOKS[book].levels, blocksize)
        assert torch.equal(got.packed, want.packed.view(-1)) and torch.equal(got.absmax, want.absmax)


@pytest.mark.parametrize("book", ["nf4", "fp4", "nf2"])
def test_quantize_breaks_ties_as_minilora_does(book):
    limits = CODEBOOKS[book].thresholds()[0]
    up, down = torch.nextafter(limits, torch.tensor(2.0)), torch.nextafter(limits, torch.tensor(-2.0))
    weight = torch.cat([limits, up, down, torch.ones(1), -torch.ones(1)])
    weight = torch.nn.functional.pad(weight, (0, -weight.numel() % 64)).view(-1, 64)
    weight[:, -1] = 1.0  # the scale of every block, so that thresholds stay thresholds
    got = mk.nf4_quantize(weight, CODEBOOKS[book].levels)
    want = quantize(weight, QuantConfig(book, double_quant=False))
    assert torch.equal(got.packed, want.packed.view(-1)) and torch.equal(got.absmax, want.absmax)
    reference = mk.quantize_reference(weight, CODEBOOKS[book].levels)
    assert torch.equal(got.packed, reference[0]) and torch.equal(got.absmax, reference[1])


def test_quantize_of_zeros_and_tiny_blocks():
    weight = torch.zeros(4, 64)
    weight[1] = 1e-39
    weight[2, 3] = 1e-30
    got = mk.nf4_quantize(weight, CODEBOOKS["nf4"].levels)
    want = quantize(weight, QuantConfig(double_quant=False))
    assert torch.equal(got.packed, want.packed.view(-1)) and torch.equal(got.absmax, want.absmax)
    ragged = torch.zeros(1, 70)
    assert torch.equal(
        mk.nf4_quantize(ragged, CODEBOOKS["nf4"].levels).absmax,
        quantize(ragged, QuantConfig(double_quant=False)).absmax,
    )


# --- what is refused, what is chosen ---


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"packed": torch.zeros(5, dtype=torch.uint8)}, "packed: found .* 5.* / wanted contiguous torch.uint8 of 4096"),
        (
            {"absmax": torch.zeros(128, dtype=torch.float16)},
            "absmax: found .*float16.* / wanted contiguous torch.float32 of 128",
        ),
        ({"blocksize": 48}, "blocksize: found 48 / wanted a power of two"),
        ({"levels": (0.0,) * 8}, "levels: found 8 / wanted 16 or 4"),
        ({"nested_absmax": torch.zeros(1)}, "absmax: found .*float32.* / wanted contiguous torch.uint8"),
    ],
)
def test_a_weight_that_does_not_fit_together_is_refused(change, words):
    _, w = packed((64, 128))
    with pytest.raises(ValueError, match=words):
        mk.Weight(**{**vars(w), **change})


def test_every_nested_part_is_looked_at():
    _, w = packed((64, 128), double=True)
    for name in ("nested_levels", "nested_absmax", "nested_offset"):
        with pytest.raises(ValueError, match=f"{name}: found"):
            mk.Weight(**{**vars(w), name: torch.zeros(99)})


def test_tiles_follow_the_work():
    def tile(m, n=4096):
        return launch.pick(launch.LINEAR["sm_90"], "sm_90", m, n, "BN").BM

    assert [tile(m) for m in (65, 512, 1024, 4096)] == [128, 128, 256, 256]
    assert tile(100, 1 << 17) == 128  # a tile of 256 rows would be more than half empty
    assert (
        launch.splits("sm_90", 32, 64) == 8
        and launch.splits("sm_90", 1000, 64) == 1
        and launch.splits("sm_90", 1, 2) == 2
    )


def test_lookups():
    bf16, f32 = torch.bfloat16, torch.float32
    assert launch.lookup_for("sm_80", bf16, 4) == "prmt" and launch.lookup_for("gfx942", bf16, 4) == "load"
    assert launch.lookup_for("sm_90", f32, 4) == "load" and launch.lookup_for("sm_90", bf16, 2) == "load"


# --- the door from minilora ---


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("book", ["nf4", "nf2"])
def test_minilora_cuda_multiplies_both_ways(rows, book):
    made, _ = packed((130, 128), book, double=True)
    x, h, b, dy, a = draw(rows, 128), draw(rows, 3), draw(130, 3, seed=1), draw(rows, 130), draw(3, 128, seed=2)
    bias = draw(130, seed=4)
    dense = made.dequantize(torch.float64)
    close(cuda.matmul(x, made, True), x.double() @ dense.T)
    close(cuda.matmul(x, made, True, h, b, bias), x.double() @ dense.T + h.double() @ b.double().T + bias.double())
    assert cuda.matmul(x, made, True, out_dtype=torch.float16).dtype == torch.float16
    close(cuda.matmul(x, made, True, h, b), x.double() @ dense.T + h.double() @ b.double().T)
    close(cuda.matmul(dy, made, False), dy.double() @ dense)
    close(cuda.matmul(dy, made, False, h, a), dy.double() @ dense + h.double() @ a.double())


def test_the_door_is_closed_on_a_cpu():
    made, _ = packed((64, 128))
    assert cuda.kernels() is mk and not cuda.available(made, draw(3, 128))


def test_what_the_kernels_cannot_take_is_refused_with_the_way_out(monkeypatch):
    made, _ = packed((64, 128), "nf3")
    with pytest.raises(QuantizationError, match="'nf3' has 3 bits; the kernels take 4 or 2"):
        cuda.matmul(draw(3, 128), made, True)
    monkeypatch.setattr(cuda, "kernels", lambda: None)
    with pytest.raises(MissingPackageError, match="Triton, which is not installed"):
        cuda.matmul(draw(3, 128), made, True)


def test_shared_memory_is_not_copied():
    made, _ = packed((64, 128), double=True)
    inside = cuda.kernel_weight(made)
    assert inside.packed.data_ptr() == made.packed.data_ptr() and inside.absmax.data_ptr() == made.absmax.data_ptr()
    assert math.prod(inside.shape) == 64 * 128 and inside.nested and inside.bits == 4

"""The products with a stack of experts, in the interpreter: against float64, against their reference, and against each other.

Rows that belong to nobody hold NaN, and so do the scales of experts without rows: neither may be read. The rest is poisoned as in
``test_kernels.py``. Divisions are written as the rows of each expert and, last, those of nobody.
"""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton, which is there for Linux only: pip install triton")

import minilora_kernels as mk
from minilora.quant.codebooks import CODEBOOKS
from minilora_kernels import grouped, launch
from minilora_kernels.launch import Tile
from tests.kernels.material import between_nan, close, draw, packed

pytestmark = pytest.mark.usefixtures("poisoned")
NAN = float("nan")
SMALL = Tile(16, 64, 64, 4, 1)
BOOKS = [name for name, book in CODEBOOKS.items() if book.bits in (2, 4)]
DIVISIONS = {
    "one expert": [9, 0],
    "one expert, and rows of nobody": [5, 12],
    "three": [7, 40, 16, 0],
    "first empty": [0, 20, 13, 0],
    "middle empty": [20, 0, 13, 0],
    "last empty": [20, 13, 0, 0],
    "eight": [0, 0, 33, 1, 0, 17, 16, 0, 5],
    "all rows to one": [0, 0, 0, 35, 0, 0, 0, 0, 0],
    "all rows to nobody": [0, 0, 0, 35],
    "as many tiles as there may be": [1, 17, 1, 17],
    "a row each": [1, 1, 1, 1, 1, 1, 1, 1, 0],
}
rows = pytest.mark.parametrize("rows", DIVISIONS.values(), ids=DIVISIONS)


def ends(rows):
    return between_nan(torch.tensor(rows[:-1]).cumsum(0).to(torch.int32))


def case(rows, n, k, r=5, forward=True, dtype=torch.float32, **kind):
    """``(input, stack, experts, offs, h, factor)``: what is nobody's, and the scales of experts without rows, are NaN."""
    count, experts = sum(rows), len(rows) - 1
    w = packed((experts * n, k), **kind)[1]
    if not w.nested and n * k % w.blocksize == 0:
        w.absmax.view(experts, -1)[torch.tensor(rows[:-1]) == 0] = NAN
    x, h = draw(count, k if forward else n, dtype=dtype), draw(count, r, seed=1)
    x[count - rows[-1] :] = NAN
    h[count - rows[-1] :] = NAN
    factor = draw(experts, n, r, seed=2) if forward else draw(experts, r, k, seed=2)
    return x, w, experts, ends(rows), h, factor


def defined(rows, x, w, experts, offs, h=None, factor=None, forward=True):
    """The products one expert at a time, in float64."""
    dense = mk.dequant_reference(w, torch.float64).view(experts, -1, w.shape[1])
    out, first = [], 0
    for e, own in enumerate(rows[:-1]):
        place, first = slice(first, first + own), first + own
        out.append(x[place].double() @ (dense[e].T if forward else dense[e]))
        if h is not None:
            out[-1] += h[place].double() @ (factor[e].T if forward else factor[e]).double()
    return torch.cat([*out, out[0].new_zeros(rows[-1], out[0].shape[1])])


@rows
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_linear(rows, double):
    x, w, *rest, h, b = case(rows, 130, 192, double=double)
    for low in ((), (h, b)):
        got = mk.grouped_linear(x, w, *rest, *low, path="fused", tile=SMALL)
        close(got, defined(rows, x, w, *rest, *low))
        close(got, mk.grouped_linear_reference(x, w, *rest, *low).double())


@rows
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_dgrad(rows, double):
    dy, w, *rest, h, a = case(rows, 192, 320, forward=False, double=double)
    for low in ((), (h, a)):
        got = mk.grouped_dgrad(dy, w, *rest, *low, path="fused", tile=SMALL)
        close(got, defined(rows, dy, w, *rest, *low, forward=False))
        close(got, mk.grouped_dgrad_reference(dy, w, *rest, *low).double())


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_every_codebook_and_blocksize(book, blocksize):
    given, kind = [3, 0, 18, 2], {"book": book, "blocksize": blocksize, "double": True}
    close(mk.grouped_linear(*(at := case(given, 64, 256, **kind)), path="fused"), defined(given, *at))
    at = case(given, 64, 256, forward=False, **kind)
    close(mk.grouped_dgrad(*at, path="fused"), defined(given, *at, forward=False))


@pytest.mark.parametrize("tile", [Tile(16, 128, 64, 4, 4), Tile(64, 128, 64, 8, 4), Tile(256, 128, 64, 8, 3)], ids=str)
def test_linear_with_the_tiles_that_are_shipped(tile):
    given = [140, 0, 17, 300, 3]
    close(mk.grouped_linear(*(at := case(given, 200, 256, 16)), tile=tile), defined(given, *at))


@pytest.mark.parametrize("tile", [Tile(64, 64, 64, 4, 4), Tile(128, 64, 128, 8, 3)], ids=str)
def test_dgrad_with_the_tiles_that_are_shipped(tile):
    given = [140, 0, 17, 30, 3]
    at = case(given, 192, 256, 16, forward=False)
    close(mk.grouped_dgrad(*at, tile=tile), defined(given, *at, forward=False))


@pytest.mark.parametrize("r", [1, 16, 33, 64, 65])
def test_ranks_are_padded_and_with_large_ones_an_expert_is_decoded_first(r):
    given = [4, 0, 9, 1]
    for forward, call in ((True, mk.grouped_linear), (False, mk.grouped_dgrad)):
        at = case(given, 64, 128, r, forward)
        close(call(*at), defined(given, *at, forward=forward))
        if r > 64:
            with pytest.raises(ValueError, match=r"rank 65, .* / wanted whole tiles .*, rank <= 64"):
                call(*at, path="fused")


@pytest.mark.parametrize("shape", [(48, 80), (7, 33), (130, 65), (3, 16)], ids=str)
@pytest.mark.parametrize("given", [[4, 0, 9, 3], [0, 0, 2, 0], [5, 0]], ids=str)
def test_shapes_that_do_not_divide_are_decoded_first(shape, given):
    """Also where a block of scales belongs to two experts."""
    for forward, call in ((True, mk.grouped_linear), (False, mk.grouped_dgrad)):
        at = case(given, *shape, forward=forward, double=True)
        close(call(*at), defined(given, *at, forward=forward))
        with pytest.raises(ValueError, match="wanted whole tiles"):
            call(*at, path="fused")


@rows
def test_both_paths_agree(rows):
    for forward, call in ((True, mk.grouped_linear), (False, mk.grouped_dgrad)):
        at = case(rows, 64, 128, forward=forward)
        close(call(*at, path="dequant"), call(*at, path="fused").double())


def test_an_expert_without_rows_is_not_decoded_first_either(monkeypatch):
    real, decoded = grouped.nf4_dequant, []
    monkeypatch.setattr(
        grouped, "nf4_dequant", lambda w, dtype, rows, out: decoded.append(rows) or real(w, dtype, rows, out)
    )
    mk.grouped_linear(*case([0, 3, 0, 4, 2], 64, 128), path="dequant")
    assert decoded == [(64, 128), (192, 256)]


class Grid:
    """In the place of a kernel: keeps with how many programs it is launched."""

    def __getitem__(self, grid):
        self.programs = grid[0]
        return lambda *args, **kwargs: None


def test_what_is_launched_does_not_depend_on_what_offs_holds(monkeypatch):
    """All of it without memory, ``offs`` too: whoever looked into it would fail."""
    kernel, given = Grid(), [7, 40, 16, 0]
    monkeypatch.setattr(grouped, "grouped_linear_kernel", kernel)
    monkeypatch.setattr(grouped, "grouped_dgrad_kernel", kernel)
    monkeypatch.setattr(launch, "arch_of", lambda device: "sm_90")
    for forward, call, across in ((True, mk.grouped_linear, 3), (False, mk.grouped_dgrad, 5)):
        x, w, experts, offs, h, factor = case(given, 192, 320, forward=forward, dtype=torch.float16)
        w = mk.Weight(**{**vars(w), "packed": w.packed.to("meta"), "absmax": w.absmax.to("meta")})
        x, offs, h, factor = (part.to("meta") for part in (x, offs, h, factor))
        call(x, w, experts, offs, h, factor, path="fused", tile=SMALL)
        assert kernel.programs == (4 + 3) * across


def test_whatever_offs_holds_nothing_is_touched_beyond_an_end():
    """The guards of results, and NaN around inputs, would show it."""
    x, w, *_ = case([9, 0], 64, 64)
    w = packed((3 * 64, 64))[1]
    for held in ([5, 100, 100], [-7, 3, 9], [9, 2, 5], [-3, -2, -1], [1000, 1001, -1]):
        offs = torch.tensor(held, dtype=torch.int32)
        got = mk.grouped_linear(x, w, 3, offs, path="fused", tile=SMALL)
        assert got.shape == (9, 64)
        with pytest.raises(ValueError, match="wanted ascending ends of at most 9 rows"):
            mk.grouped_linear(x, w, 3, offs, path="dequant")
    within = mk.grouped_linear(x, w, 3, torch.tensor([5, 100, 100], dtype=torch.int32), tile=SMALL)
    close(within, mk.grouped_linear_reference(x, w, 3, torch.tensor([5, 9, 9]).int()).double())


def test_no_rows():
    x, w, experts, offs, h, b = case([0, 0, 0, 0], 64, 128)
    for path in (None, "fused", "dequant"):
        assert mk.grouped_linear(x, w, experts, offs, h, b, path=path).shape == (0, 64)
        assert mk.grouped_dgrad(draw(0, 64), w, experts, offs, path=path).shape == (0, 128)


def test_fp16_goes_through_with_its_own_rounding():
    given = [4, 0, 20, 2]
    for forward, call in ((True, mk.grouped_linear), (False, mk.grouped_dgrad)):
        at = case(given, 64, 128, forward=forward, dtype=torch.float16)
        got, want = call(*at), defined(given, *at, forward=forward)
        assert got.dtype == torch.float16 and (got.double() - want).norm() < 1e-3 * want.norm()


def test_inputs_need_not_be_contiguous():
    given = [4, 0, 20, 2]
    for forward, call in ((True, mk.grouped_linear), (False, mk.grouped_dgrad)):
        x, w, experts, offs, h, factor = case(given, 64, 128, forward=forward)
        turned = [part.mT.contiguous().mT for part in (x, h, factor)]
        assert not any(part.is_contiguous() for part in turned)
        spread = torch.stack([offs, offs], 1)[:, 0]
        for path in ("fused", "dequant"):
            got = call(turned[0], w, experts, spread, *turned[1:], path=path)
            close(got, defined(given, x, w, experts, offs, h, factor, forward))


def test_the_backward_of_a_whole_layer_is_autograd_s():
    given, scale = [6, 0, 20, 3], 2.5
    x, w, experts, offs, _, b = case(given, 64, 128, 4)
    a, dy, expert = (
        draw(experts, 4, 128, seed=3),
        draw(29, 64, seed=4),
        torch.arange(3).repeat_interleave(torch.tensor(given[:-1])),
    )
    x, dy = x[:26], dy[:26]
    leaf = x.double().requires_grad_()
    h = scale * torch.einsum("sk,srk->sr", leaf, a.double()[expert])
    y = mk.grouped_linear_reference(leaf, w, experts, offs, h, b.double())
    (dx,) = torch.autograd.grad(y, leaf, dy.double())
    close(mk.grouped_linear(x, w, experts, offs, h.detach().float(), b), y.detach())
    dyb = scale * torch.einsum("sn,snr->sr", dy, b[expert])
    close(mk.grouped_dgrad(dy, w, experts, offs, dyb, a), dx)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(13, 64)}, r"input: found \(13, 64\) / wanted \(13, 128\)"),
        ({"experts": 5}, "experts: found 5 / wanted a divisor of the weight's 192 rows"),
        ({"experts": 0}, "experts: found 0"),
        ({"offs": torch.zeros(4, dtype=torch.int32)}, r"offs: found \(4,\) / wanted \(3,\)"),
        ({"offs": torch.zeros(3, dtype=torch.int64)}, "offs: found torch.int64 on cpu / wanted torch.int32 on cpu"),
        (
            {"offs": torch.zeros(3, dtype=torch.int32, device="meta")},
            "found torch.int32 on meta / wanted torch.int32 on cpu",
        ),
        ({"h": torch.zeros(12, 5)}, r"h: found \(12, 5\) / wanted \(13, 5\)"),
        ({"h": None}, r"h: found None / wanted \(13, 0\)"),
        ({"B": None}, r"B: found None / wanted \(3, 64, 5\)"),
        ({"B": torch.zeros(3, 5, 64)}, r"B: found \(3, 5, 64\) / wanted \(3, 64, 5\)"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, words):
    named = dict(zip(("x", "w", "experts", "offs", "h", "B"), case([4, 0, 9, 0], 64, 128), strict=True))
    for path in (None, "fused", "dequant"):
        with pytest.raises(ValueError, match=words):
            mk.grouped_linear(**{**named, **change}, path=path)


def test_the_factor_of_the_gradient_lies_the_other_way():
    *at, a = case([4, 0, 9, 0], 64, 128, forward=False)
    with pytest.raises(ValueError, match=r"A: found \(3, 128, 5\) / wanted \(3, 5, 128\)"):
        mk.grouped_dgrad(*at, a.mT)


def test_tiles_follow_the_rows_of_an_expert():
    def tile(arch, m, experts=8):
        return launch.pick(launch.grouped_tiles(arch), arch, m * experts, 4096, "BN", experts).BM

    assert [tile("sm_90", m) for m in (1, 8, 20, 64, 128, 4096)] == [16, 16, 32, 64, 128, 256]
    assert [tile("gfx942", m) for m in (1, 64, 4096)] == [32, 32, 128] and tile("sm_100", 1) == 64
    assert tile("sm_90", 1, 256) == 16

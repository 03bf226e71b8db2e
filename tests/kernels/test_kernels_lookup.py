"""The look-up in assembly, which the interpreter cannot run: its instructions are emulated one by one.

Checked for every byte in every place, several codebooks and both 16-bit types, without and with the scale; and that what it computes is as
exact as the module says.
"""

import re
from fractions import Fraction

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton, which is there for Linux only: pip install triton")

from minilora.quant.codebooks import CODEBOOKS
from minilora_kernels.lookup import OPERANDS, OPERANDS_SCALED, PER_LANE, lookup_asm
from minilora_kernels.weight import plane_words, prescale, table

NF4 = CODEBOOKS["nf4"].levels
TYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
BOOKS = {name: book.levels for name, book in CODEBOOKS.items() if book.bits == 4}
BOOKS["random"] = tuple(
    (torch.rand(16, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 - 1).tolist()
)


# --- the machine ---


def bits_of(values, dtype):
    """The 16 bits of each value, rounded to ``dtype`` to nearest, ties to even."""
    return [int(v) & 0xFFFF for v in torch.as_tensor(values, dtype=torch.float64).to(dtype).view(torch.int16)]


def number(bits, dtype):
    """The exact value of 16 bits."""
    signed = bits - (1 << 16) if bits >> 15 else bits
    return Fraction(torch.tensor([signed], dtype=torch.int16).view(dtype).double().item())


def rounded(exact, dtype):
    """The 16 bits nearest to a fraction, ties to even: found among the neighbours of a first guess."""
    guess = bits_of([float(exact)], dtype)[0]
    near = [guess] + [guess + step for step in (-1, 1) if 0 <= (guess & 0x7FFF) + step < 0x7C00]
    return min(near, key=lambda bits: (abs(number(bits, dtype) - exact), bits & 1))


def permute(a, b, selector):
    """``prmt.b32``: four bytes picked from the eight of b:a; bit 3 of a pick would spread the sign, which is not used."""
    source = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    picks = [selector >> 4 * i & 15 for i in range(4)]
    assert all(pick < 8 for pick in picks), "a pick with bit 3 set spreads the sign of a byte"
    return int.from_bytes(bytes(source[pick] for pick in picks), "little")


def multiply_add(a, b, c, dtype):
    """``fma.rn`` on two 16-bit halves."""
    halves = [(a >> s & 0xFFFF, b >> s & 0xFFFF, c >> s & 0xFFFF) for s in (0, 16)]
    found = [rounded(number(x, dtype) * number(y, dtype) + number(z, dtype), dtype) for x, y, z in halves]
    return found[0] | found[1] << 16


def run(code, inputs):
    """The registers after ``code``; reading one that was never written fails."""
    registers = dict(inputs)
    results = []

    def read(name):
        return int(name, 0) if name[0].isdigit() else registers[name]

    for statement in code.strip("{}\n ").split(";"):
        if not (statement := statement.strip()) or statement.startswith(".reg"):
            continue
        name, rest = statement.split(None, 1)
        target, *sources = [part.strip() for part in rest.split(",")]
        if target.startswith("$"):
            results.append(target)
        values = [read(source) for source in sources]
        kind, _, suffix = name.partition(".")
        if kind == "and":
            registers[target] = values[0] & values[1]
        elif kind == "xor":
            registers[target] = values[0] ^ values[1]
        elif kind == "shr":
            registers[target] = values[0] >> values[1]
        elif kind == "mov":
            registers[target] = values[0]
        elif kind == "lop3":
            assert values[3] == 0xEA  # (a & b) | c
            registers[target] = values[0] & values[1] | values[2]
        elif kind == "prmt":
            registers[target] = permute(*values)
        elif kind == "fma":
            registers[target] = multiply_add(*values, TYPES[re.fullmatch(r"rn\.(\w+)x2", suffix).group(1)])
        else:
            raise AssertionError(f"unknown instruction {name}")
    assert sorted(results) == ["$0", "$1", "$2", "$3"], "every result is written once"
    return [registers[f"${i}"] for i in range(4)]


def operands(octets, words, coarse=(), fine=()):
    """The numbered operands as Triton passes them: four bytes, eight words four times each, and for each byte a scale's two parts."""
    listed = [int.from_bytes(bytes(octets), "little"), *(word & 0xFFFFFFFF for word in words for _ in range(4))]
    listed += [bits | bits << 16 for bits in (*coarse, *fine)]
    return {f"${4 + i}": value for i, value in enumerate(listed)}


# --- the tests ---


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("book", BOOKS)
def test_every_byte_in_every_place(book, dtype):
    words, bits = plane_words(BOOKS[book], TYPES[dtype]), bits_of(BOOKS[book], TYPES[dtype])
    code = lookup_asm()
    for byte in range(256):
        octets = [(byte + 67 * place) % 256 for place in range(4)]  # each place sees every byte, beside others
        want = [bits[octet >> 4] | bits[octet & 15] << 16 for octet in octets]  # first weight, high nibble, lower half
        assert run(code, operands(octets, words)) == want


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("book", ["nf4", "fp4", "random"])
def test_the_scale_is_multiplied_in_with_both_its_parts(book, dtype):
    kind = TYPES[dtype]
    words, bits = plane_words(BOOKS[book], kind), bits_of(BOOKS[book], kind)
    scales = torch.rand(4, generator=torch.Generator().manual_seed(1)) * 0.1
    coarse = bits_of(scales, kind)
    fine = bits_of(scales - torch.tensor(coarse, dtype=torch.int32).to(torch.int16).view(kind).float(), kind)
    code = lookup_asm(dtype)

    def scaled(level, place):
        low = rounded(number(bits[level], kind) * number(fine[place], kind), kind)
        return rounded(number(bits[level], kind) * number(coarse[place], kind) + number(low, kind), kind)

    expected = [[scaled(level, place) for level in range(16)] for place in range(4)]
    for byte in range(256):
        octets = [(byte + 67 * place) % 256 for place in range(4)]
        found = run(code, operands(octets, words, coarse, fine))
        for place, octet in enumerate(octets):
            halves = (found[place] & 0xFFFF, found[place] >> 16)
            for half, level in zip(halves, (octet >> 4, octet & 15), strict=True):
                assert number(half, kind) == number(expected[place][level], kind)  # -0 is 0
                exact = number(bits[level], kind) * Fraction(scales[place].item())
                step = abs(number(half ^ 1, kind) - number(half, kind))
                assert abs(number(half, kind) - exact) <= Fraction(65, 100) * step, "one rounding, not two"


@pytest.mark.parametrize("dtype", TYPES)
def test_words_hold_the_planes(dtype):
    words = [word & 0xFFFFFFFF for word in plane_words(NF4, TYPES[dtype])]
    high, low = (b"".join(word.to_bytes(4, "little") for word in words[i : i + 4]) for i in (0, 4))
    assert [a << 8 | b for a, b in zip(high, low, strict=True)] == bits_of(NF4, TYPES[dtype])
    assert all(-(1 << 31) <= word < 1 << 31 for word in plane_words(NF4, TYPES[dtype]))


def test_constraints_count_the_operands():
    for code, constraint in ((lookup_asm(), OPERANDS), (lookup_asm("bf16"), OPERANDS_SCALED)):
        used = {int(n) for n in re.findall(r"\$(\d+)", code)}
        assert max(used) < len(constraint.value.split(","))
        assert constraint.value.split(",")[:5] == ["=&r"] * 4 + ["r"]


def test_the_hidden_zero_is_zero_in_every_lane():
    assert "%lanemask_gt" in PER_LANE.value
    for lane in range(32):
        above = (0xFFFFFFFF << lane + 1) & 0xFFFFFFFF  # what the PTX manual says the register holds
        assert above & 1 == 0


def weight_error(values, exact):
    return float((values - exact).norm() / exact.norm())


def test_prescaling_makes_the_rounded_table_closer():
    levels = torch.tensor(NF4, dtype=torch.float64)
    factor = prescale(NF4, torch.bfloat16)
    plain = weight_error(levels.bfloat16().double(), levels)
    better = weight_error((levels * factor).bfloat16().double() / factor, levels)
    assert 1 <= factor < 2 and better < 0.7 * plain and better < 1e-3


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 1.81e-3), (torch.float16, 2.25e-4)], ids=str)
def test_error_of_a_decoded_weight(dtype, most):
    """The figures of kernels/README.md: what weights and outputs lose, in the same arithmetic with torch."""
    generator = torch.Generator().manual_seed(0)
    codes, scales = torch.randint(16, (1 << 16,), generator=generator), torch.rand(1 << 16, generator=generator) + 0.5
    levels, factor = torch.tensor(NF4, dtype=torch.float64), prescale(NF4, dtype)
    exact = levels[codes] * scales.double()
    inside = scales * (1 / factor)
    coarse = inside.to(dtype)
    fine = (inside - coarse.float()).to(dtype)
    rounded_levels = (levels * factor).to(dtype).double()[codes]
    found = (rounded_levels * coarse.double() + (rounded_levels * fine.double()).to(dtype).double()).to(dtype).double()
    nearest, after = exact.to(dtype).double(), rounded_levels / factor * scales.double()
    library = weight_error(nearest, exact)
    assert weight_error(found, exact) < min(most, 1.08 * library) and weight_error(after, exact) < 0.4 * library
    x = torch.randn(128, 256, generator=generator).to(dtype).double()

    def output(weights):
        return weight_error((x @ weights.view(256, 256).T).to(dtype).double(), x @ exact.view(256, 256).T)

    assert output(found) < 1.05 * output(nearest) and output(after) < 0.8 * output(nearest)


def test_a_table_first_asked_for_while_a_model_loads_is_a_real_one():
    table.cache_clear()
    with torch.device("meta"):
        made = table(NF4, torch.float16, "cpu", "prmt")
    assert made.words.tolist() == plane_words(tuple(prescale(NF4, torch.float16) * v for v in NF4), torch.float16)


def test_tables_are_made_once():
    first = table(NF4, torch.bfloat16, "cpu", "prmt")
    assert first is table(NF4, torch.bfloat16, "cpu", "prmt") and first.words.dtype == torch.int32
    assert (
        first.inverse == 1 / prescale(NF4, torch.bfloat16) and table(NF4, torch.bfloat16, "cpu", "load").inverse == 1.0
    )

"""From codes to numbers inside a kernel, in two ways.

``prmt`` (NVIDIA, 4 bits, bf16 and fp16): the table lies in eight 32-bit words, one plane of high and one of low bytes, and the byte-permute
instruction looks four codes up at once. One packed byte becomes one register with two numbers, the first code in the lower half: exactly
one register of a tensor-core fragment, so bitsandbytes' byte order needs no repacking. The scale follows as two multiply-adds, with its
high and its low part, so that it loses nothing to 16 bits.
``load`` (anything else, and the interpreter): reads a table of fp32 levels, multiplies in fp32, rounds once.

The assembly cannot run in the interpreter; tests emulate it, instruction by instruction. Next file: ``launch.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl


def lookup_asm(scaled: str | None = None) -> str:
    """PTX that decodes four packed bytes to four registers of two 16-bit numbers.

    Operands: $0-$3 results, $4 the bytes, then the eight words, each four times (one per byte; only the first is used), then, if
    ``scaled`` is "bf16" or "f16", the high and the low part of each byte's scale, each twice in a register.
    """
    words = [f"${5 + 4 * i}" for i in range(8)]
    lines = [
        ".reg .b32 index, pick, low, high, hi, lo, v<4>",
        "and.b32 index, $4, 0x77777777",  # the lower three bits of every code: one of eight bytes
        "shr.u32 pick, $4, 1",  # its highest bit, moved to where it adds 4 to the number of a byte
        "lop3.b32 pick, pick, 0x44444444, 0x32103210, 0xEA",  # (pick & 0x4444...) | 0x3210...
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 index, index, 16", "shr.u32 pick, pick, 16"]
        for plane, result in ((words[:4], "hi"), (words[4:], "lo")):
            lines += [
                f"prmt.b32 low, {plane[0]}, {plane[1]}, index",  # if the code is below 8
                f"prmt.b32 high, {plane[2]}, {plane[3]}, index",  # if it is 8 or above
                f"prmt.b32 {result}, low, high, pick",
            ]
        # A byte's high nibble is the first weight: it goes to the lower half of the register.
        lines += [f"prmt.b32 v{2 * half}, lo, hi, 0x4051", f"prmt.b32 v{2 * half + 1}, lo, hi, 0x6273"]
    if scaled:
        lines.append("mov.b32 index, 0x80008000")  # -0 twice: adding it changes no number
    for i in range(4):
        if scaled:
            lines.append(f"fma.rn.{scaled}x2 low, v{i}, ${41 + i}, index")
            lines.append(f"fma.rn.{scaled}x2 ${i}, v{i}, ${37 + i}, low")
        else:
            lines.append(f"mov.b32 ${i}, v{i}")
    return "{\n" + "".join(f"{line};\n" for line in lines) + "}"


_OPERANDS = "=&r,=&r,=&r,=&r" + ",r" * 33  # & : a result is written before every operand has been read
ASM = tl.constexpr(lookup_asm())
ASM_BF16 = tl.constexpr(lookup_asm("bf16"))
ASM_F16 = tl.constexpr(lookup_asm("f16"))
OPERANDS = tl.constexpr(_OPERANDS)
OPERANDS_SCALED = tl.constexpr(_OPERANDS + ",r" * 8)


# Adds a zero that the compiler does not know to be one (bit 0 of the mask of the lanes above). Otherwise it puts a word, which is the
# same in all lanes, into a uniform register, and copies it back for every byte permute: a sixth of the instructions of a loop.
PER_LANE = tl.constexpr("{ .reg .b32 z; mov.u32 z, %lanemask_gt; and.b32 z, z, 1; xor.b32 $0, $1, z; }")


@triton.jit
def load_word(word, LOOKUP: tl.constexpr):
    """One word of a table, in a register of every lane."""
    if LOOKUP == "prmt":
        return tl.inline_asm_elementwise(PER_LANE, "=r,r", [tl.load(word)], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return 0


@triton.jit
def load_words(words, LOOKUP: tl.constexpr):
    """The eight words of a table (eight zeros where they are not used)."""
    return (
        load_word(words, LOOKUP),
        load_word(words + 1, LOOKUP),
        load_word(words + 2, LOOKUP),
        load_word(words + 3, LOOKUP),
        load_word(words + 4, LOOKUP),
        load_word(words + 5, LOOKUP),
        load_word(words + 6, LOOKUP),
        load_word(words + 7, LOOKUP),
    )


@triton.jit
def load_scales(absmax, code2, absmax2, shift, block, NESTED: tl.constexpr):
    """fp32 scales of the blocks numbered ``block``; ``shift`` is the loaded offset of double quantization."""
    if NESTED:
        code = tl.load(absmax + block).to(tl.int32)
        return tl.load(code2 + code) * tl.load(absmax2 + (block >> 8)) + shift
    else:
        return tl.load(absmax + block)


@triton.jit
def load_shift(offset, NESTED: tl.constexpr):
    """The offset of double quantization, or zero."""
    if NESTED:
        return tl.load(offset)
    else:
        return 0.0


@triton.jit
def spread(values, ROWS: tl.constexpr, GROUPS: tl.constexpr, COLS: tl.constexpr):
    """``[ROWS, GROUPS]`` to ``[ROWS, COLS]``, each value ``COLS / GROUPS`` times."""
    if GROUPS == 1:
        return tl.broadcast_to(values, (ROWS, COLS))
    else:
        WIDTH: tl.constexpr = COLS // GROUPS
        return tl.reshape(tl.broadcast_to(values[:, :, None], (ROWS, GROUPS, WIDTH)), (ROWS, COLS))


@triton.jit
def twice(values):
    """A 16-bit float in both halves of an int32."""
    bits = values.to(tl.uint16, bitcast=True).to(tl.int32)
    return bits | (bits << 16)


@triton.jit
def halves(pairs, CT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """int32 ``[ROWS, COLS / 2]``, two numbers each, to ``[ROWS, COLS]`` of the 16-bit type ``CT``."""
    first = (pairs & 0xFFFF).to(tl.uint16).to(CT, bitcast=True)
    second = ((pairs >> 16) & 0xFFFF).to(tl.uint16).to(CT, bitcast=True)
    return tl.reshape(tl.join(first, second), (ROWS, COLS))


@triton.jit
def levels_of(packed, levels, BITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """fp32 levels ``[ROWS, COLS]`` of uint8 ``[ROWS, COLS * BITS / 8]``, read from the table ``levels`` (the portable way)."""
    code = packed.to(tl.int32)
    if BITS == 4:
        return tl.reshape(tl.join(tl.load(levels + (code >> 4)), tl.load(levels + (code & 15))), (ROWS, COLS))
    else:
        even = tl.join(tl.load(levels + (code >> 6)), tl.load(levels + ((code >> 2) & 3)))
        odd = tl.join(tl.load(levels + ((code >> 4) & 3)), tl.load(levels + (code & 3)))
        return tl.reshape(tl.join(even, odd), (ROWS, COLS))


@triton.jit
def decode(packed, scales, table, levels, LOOKUP: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr, CT: tl.constexpr,
           ROWS: tl.constexpr, GROUPS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """A tile of weights ``[ROWS, COLS]`` in the dtype ``CT``.

    Args:
        packed: uint8 ``[ROWS, COLS * BITS / 8]``. scales: fp32 ``[ROWS, GROUPS]``; used if ``SCALED``.
        table: the eight words (``prmt``). levels: pointer to the fp32 levels (``load``).
    """
    if LOOKUP == "prmt":
        tl.static_assert(BITS == 4)
        t0, t1, t2, t3, t4, t5, t6, t7 = table
        if SCALED:
            coarse = scales.to(CT)
            fine = spread(twice((scales - coarse.to(tl.float32)).to(CT)), ROWS, GROUPS, COLS // 2)
            coarse = spread(twice(coarse), ROWS, GROUPS, COLS // 2)
            code: tl.constexpr = ASM_BF16 if tl.bfloat16 == CT else ASM_F16
            pairs = tl.inline_asm_elementwise(code, OPERANDS_SCALED, [packed, t0, t1, t2, t3, t4, t5, t6, t7, coarse, fine],
                                              dtype=tl.int32, is_pure=True, pack=4)  # fmt: skip
        else:
            pairs = tl.inline_asm_elementwise(ASM, OPERANDS, [packed, t0, t1, t2, t3, t4, t5, t6, t7],
                                              dtype=tl.int32, is_pure=True, pack=4)  # fmt: skip
        return halves(pairs, CT, ROWS, COLS)
    else:
        values = levels_of(packed, levels, BITS, ROWS, COLS)
        if SCALED:
            values = values * spread(scales, ROWS, GROUPS, COLS)
        return values.to(CT)

"""Lesson 6. Counting bits.

Why does a weight of four bits take 4.5, or with double quantization 4.127? Fill in the functions; ``minilora learn check 6`` looks at
them.
"""


def bits_per_weight(bits: int, blocksize: int) -> float:
    """Bits of a weight with its share of the scale: codes of ``bits`` bits, and an fp32 scale for each block. Whole blocks."""
    raise NotImplementedError


def double_quantized(bits: int, blocksize: int) -> float:
    """The same where scales are kept in 8 bits, and 256 of them share an fp32 scale of their own (QLoRA, section 3).

    The one fp32 mean of all scales of a tensor is left out; it does not count in a large one.
    """
    raise NotImplementedError


def stored_bytes(out_features: int, in_features: int, bits: int, blocksize: int, double: bool) -> int:
    """The exact bytes of a weight [out, in] as minilora keeps it, for any size.

    Codes lie without gaps, and the last byte is filled up; the last block may be short, and has a scale all the same. With ``double`` each
    scale takes one byte, each 256 of them (or fewer at the end) an fp32 scale, and the tensor one fp32 mean.
    """
    raise NotImplementedError


def affordable_blocksize(bits: int, most: float) -> int:
    """The smallest power of two from 32 to 4096 for which ``bits_per_weight`` is at most ``most``. Raises ValueError where none is.

    A small block is exact and a large one cheap; so one takes the smallest that can be paid for.
    """
    raise NotImplementedError

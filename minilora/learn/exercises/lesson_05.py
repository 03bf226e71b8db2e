"""Lesson 5. One block by hand.

    64 weights --(/ largest magnitude)--> values in [-1, 1] --(nearest of 16 levels)--> 64 codes of 4 bits = 32 bytes, and one scale

This is how QLoRA stores a weight (Dettmers et al. 2023, arXiv 2305.14314, section 3). Fill in the functions; ``minilora learn check 5``
looks at them.
"""

import torch


def absmax(weight: torch.Tensor, blocksize: int) -> torch.Tensor:
    """The largest magnitude of each block of the flattened weight, fp32 [ceil(n / blocksize)].

    Blocks run on over the ends of rows. The last block may be shorter.
    """
    raise NotImplementedError


def codes(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """The number of the nearest level for each value, uint8 [n].

    values is fp32 [n] in [-1, 1]; levels is fp32 [16], sorted. A value in the middle between two levels, (a + b) / 2 in fp32, gets the
    lower one.
    """
    raise NotImplementedError


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes in a byte, the first of them in the four high bits: uint8 [n] to uint8 [ceil(n / 2)].

    After an odd number of codes the last four bits are 0.
    """
    raise NotImplementedError


def decode(
    packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, blocksize: int, count: int
) -> torch.Tensor:
    """The weights again: each level times the scale of its block, fp32 [count].

    packed is uint8 as ``pack`` makes it, absmax fp32 [ceil(count / blocksize)], levels fp32 [16].
    """
    raise NotImplementedError

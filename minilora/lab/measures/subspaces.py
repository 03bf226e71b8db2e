"""Whether two adapters use the same directions (Hu et al. 2021, arXiv 2106.09685, section 7.2, equation 4, and appendix G).

    phi(A_1, A_2, i, j) = || U_1^i^T U_2^j ||_F^2 / min(i, j)        in [0, 1]

``U^i`` has the first i right-singular vectors of A as its columns; for B they are the left-singular ones. 1: the smaller of the two spans
lies in the other. 0: they are orthogonal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilora.errors import ConfigError, KindError, StateError
from minilora.files import validate
from minilora.lora.adapter import Adapter
from minilora.lora.layer import LoRALinear

__all__ = ["similarity_grid", "subspace_similarity"]


def subspace_similarity(first: Adapter | Tensor, second: Adapter | Tensor, i: int, j: int, *, side: str = "A") -> float:
    """``phi`` of the first i directions of one adapter's factor and the first j of another's.

    Args:
        first, second: adapters of layers that have the same ``in`` (side "A") or ``out`` (side "B"), of any rank, such as
            ``report.inspect.adapters_in(model, name)[path]``; or the factors themselves, ``A [r, in]`` or ``B [out, r]``.
        side: "A" or "B".

    Raises:
        ConfigError: a side that does not exist, sizes that differ, i or j above the rank that the factor has in numbers.
        StateError: an update without factors. KindError: neither an adapter nor a tensor.
    """
    grid = similarity_grid(first, second, side=side)
    for name, value, rank in (("i", i, len(grid)), ("j", j, grid.shape[1])):
        validate.whole(name, value, 1)
        if value > rank:
            raise ConfigError(f"{name}={value}: the factor has {rank} directions; wanted at most as many")
    return float(grid[i - 1, j - 1])


@torch.no_grad()
def similarity_grid(first: Adapter | Tensor, second: Adapter | Tensor, *, side: str = "A") -> Tensor:
    """``phi`` for every i and j: fp64 ``[rank of the first, rank of the second]`` on the CPU, i and j counted from 1.

    The ranks are those that the factors have in numbers: directions of a singular value of 0 are no directions. Arguments and errors are
    those of ``subspace_similarity``; ConfigError too for a factor of zeros, as B is before training.
    """
    if side not in ("A", "B"):
        raise ConfigError(f"side={side!r}: wanted 'A' (right-singular vectors) or 'B' (left-singular vectors)")
    one, other = (_directions(each, side) for each in (first, second))
    if len(one) != len(other):
        raise ConfigError(f"directions of {len(one)} and of {len(other)} numbers cannot be compared; wanted the same")
    shared = (one.T @ other).square().cumsum(0).cumsum(1)
    smaller = torch.minimum(*torch.meshgrid(*(torch.arange(1, n + 1) for n in shared.shape), indexing="ij"))
    return shared / smaller


def _directions(what: Adapter | Tensor, side: str) -> Tensor:
    """Singular vectors of a factor as columns, ``[in or out, rank]``, largest singular value first."""
    factor = _factor(what, side).detach().to("cpu").double()
    if factor.dim() != 2 or not bool(factor.isfinite().all()):
        raise ConfigError(f"a factor {side} of shape {list(factor.shape)}: wanted two dimensions and finite numbers")
    U, S, _ = torch.linalg.svd(factor.T if side == "A" else factor, full_matrices=False)
    least = torch.finfo(torch.float32).eps * max(factor.shape) * S[:1]  # below it is rounding of fp32 factors
    rank = int(S.gt(least).sum())
    if not rank:
        raise ConfigError(f"the factor {side} is zero, so it has no directions; compare adapters that were trained")
    return U[:, :rank]


def _factor(what: Adapter | Tensor, side: str) -> Tensor:
    if isinstance(what, Tensor):
        return what
    if not isinstance(what, Adapter):
        raise KindError(f"a {type(what).__name__} has no factors; wanted the adapter of a layer, or a tensor")
    try:
        A, B = what.factors() if isinstance(what, LoRALinear) else what.as_lora()
    except StateError as error:
        raise StateError(f"{type(what).__name__} has no factors to compare: {error}") from None
    return A if side == "A" else B

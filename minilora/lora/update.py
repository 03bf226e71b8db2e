"""How large an update is and how many directions it has, from its factors: ``[out, in]`` is not formed.

With ``delta_weight() == B A`` and the thin QR decompositions ``B = Q_B R_B`` and ``A^T = Q_A R_A`` the update is ``Q_B (R_B R_A^T) Q_A^T``.
The outer two only turn, so singular values and Frobenius norm are those of the small matrix between them: O((in + out) r^2) instead of
O(in out min(in, out)). It is computed in fp64, because factors of a start (PiSSA) are subtracted. An update without a low rank (DoRA),
and one of a class that changes ``delta_weight`` alone, is formed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minilora.errors import StateError
from minilora.linear.layers import dense_weight
from minilora.lora.adapter import Adapter
from minilora.lora.layer import LoRALinear

__all__ = ["low_rank", "spectra_at", "spectrum", "update_norm", "weight_norm"]


def low_rank(adapter: Adapter) -> tuple[Tensor, Tensor] | None:
    """``(A [r, in], B [out, r])`` in fp32 with ``delta_weight() == B @ A``; None where the update has no low rank."""
    kind = type(adapter)
    if isinstance(adapter, LoRALinear) and kind.delta_weight is LoRALinear.delta_weight:
        A, B = adapter.factors()  # of one with lora_bias too, which is no plain LoRA to other programs
        return A, adapter.scaling * B
    if not issubclass(_owner(kind, "as_lora"), _owner(kind, "delta_weight")):
        return None  # its factors are those of a class above it, whose update is another one
    try:
        return adapter.as_lora()
    except StateError:
        return None


def _owner(kind: type, method: str) -> type:
    """The class that a method of ``kind`` comes from."""
    return next(above for above in kind.__mro__ if method in vars(above))


@torch.no_grad()
def spectrum(adapter: Adapter) -> Tensor:
    """Singular values of the update, largest first, fp32 ``[min(r, in, out)]``; ``[min(in, out)]`` where it has no low rank. Of experts
    those of each, ``[experts, ...]``.

    Raises:
        StateError: the update is another one for each input (aLoRA).
    """
    return torch.linalg.svdvals(_core(adapter)).float()


def spectra_at(path: str, adapter: Adapter) -> dict[str, Tensor]:
    """``spectrum`` by the name of the matrix: the path, and of experts ``path[0]``, ``path[1]`` and so on."""
    values = spectrum(adapter)
    return {path: values} if values.dim() == 1 else {f"{path}[{at}]": own for at, own in enumerate(values)}


@torch.no_grad()
def update_norm(adapter: Adapter) -> float:
    """The Frobenius norm of the update. Raises as ``spectrum``."""
    return float(_core(adapter).norm())


@torch.no_grad()
def weight_norm(adapter: Adapter) -> float:
    """The Frobenius norm of the base weight that the update is added to, which is unpacked for it."""
    return float(dense_weight(adapter.innermost).float().norm())


def _core(adapter: Adapter) -> Tensor:
    """A matrix with the update's singular values: ``R_B R_A^T`` in fp64, or the update itself in fp32."""
    if (factors := low_rank(adapter)) is None:
        return adapter.delta_weight().float()
    A, B = (_exact(factor) for factor in factors)
    left, right = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.mT, mode="r").R
    return left @ right.mT


def _exact(factor: Tensor) -> Tensor:
    """In fp64, which Apple's GPUs do not have."""
    return (factor.cpu() if factor.device.type == "mps" else factor).double()

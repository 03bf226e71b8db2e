"""DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5 and section 4.3): direction and magnitude of every output row apart.

    W' = (m / c) (W + s B A),   c = row norms of (W + s B A), held constant in the backward pass;  m = row norms of W at the start

The norms come from ``c^2 = |W|^2 + 2 s <W, B A> + s^2 |B A|^2`` row by row, where ``<W, B A> = rowsum((W A^T) * B)`` and
``|B A|^2 = rowsum((B (A A^T)) * B)``: the base layer applied to the r rows of A, and thin products. Neither a dense ``B A`` nor, for a
packed base, a dense W is formed in a step.
Next file: ``many/batched.py``.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from minilora.errors import StateError
from minilora.linear.layers import compute_dtype, dense_weight, is_quantized, product
from minilora.lora.adapter import Adapter, register
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear

_caching = False  # see DoraCaching
_NOTHING = 1e-6  # of the sum of two squared norms: what rounding leaves of a difference that is zero


def moved_norms(squared: Tensor, WA: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """The norms of the rows of ``W + s B A``, ``[out]``: from ``squared``, those of W squared, and ``WA = A W^T`` ``[r, out]``; or
    of several, with one more dimension in front.
    """
    cross, square = (WA.mT * B).sum(-1), ((B @ (A @ A.mT)) * B).sum(-1)
    moved = squared + 2 * s * cross + s * s * square
    return torch.where(moved > _NOTHING * (squared + s * s * square), moved, 0).sqrt()


def ratio_and_moves(magnitude: Tensor, norms: Tensor, squared: Tensor) -> tuple[Tensor, Tensor]:
    """``m / c``, and 1 or 0 for whether a row takes the update.

    A row of zeros has no direction: its ratio is 1, so that it stays what it was and B gets its gradient. One that the update cancels
    has lost its own, and is the base's.
    """
    gone = norms == 0
    ratio = torch.where(gone, 1.0, magnitude.float() / torch.where(gone, 1.0, norms))
    return ratio, 1.0 - (gone & (squared > 0)).float()


@register("dora")
class DoRALinear(LoRALinear):
    """A linear layer whose update is scaled row by row.

    Attributes:
        lora_magnitude_vector: ``[out]`` fp32, trained: the wanted norm of each output row.
        base_norm_squared: ``[out]`` fp32, of the base weight's rows; computed once, not saved.
    """

    file_names: ClassVar[dict[str, str]] = LoRALinear.file_names | {"lora_magnitude_vector": "lora_magnitude_vector"}
    reads_base: ClassVar[bool] = True
    base_norm_squared: Tensor
    _kept: tuple[tuple[object, ...], Tensor] | None = None

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        super().__init__(base_layer, config, path)
        squared = dense_weight(self.innermost).float().square().sum(-1)
        self.register_buffer("base_norm_squared", squared, persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.over_outputs(self.row_norms()).clone())

    def over_outputs(self, values: Tensor) -> Tensor:
        """``[out]`` shaped so that it is broadcast over the layer's output."""
        return values

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """``c``: the norms of the rows of ``W + s B A``, fp32 ``[out]``."""
        A, B = self.factors()
        WA = product(self.innermost, A.to(self._base_dtype())).float()
        return moved_norms(self.base_norm_squared, WA, A, B, self.scaling)

    def _base_dtype(self) -> torch.dtype:
        """What the innermost layer takes: its weight's dtype; a packed one takes fp32."""
        return torch.float32 if is_quantized(self.innermost) else compute_dtype(self.innermost)

    def forward(self, x: Tensor) -> Tensor:
        shown = self.base_layer(x)
        plain = self.innermost(x) if isinstance(self.base_layer, Adapter) else shown
        bias: Tensor | None = self.innermost.bias  # type: ignore[assignment]
        if bias is not None:
            plain = plain - self.over_outputs(bias).to(plain.dtype)
        ratio, moves = (self.over_outputs(each).to(plain.dtype) for each in self._ratio())
        return shown + (ratio - 1) * plain + ratio * moves * self.update(self.lora_dropout(x))

    def _ratio(self) -> tuple[Tensor, Tensor]:
        """As ``ratio_and_moves``, ``[out]`` both."""
        return ratio_and_moves(self.lora_magnitude_vector.flatten(), self._norms(), self.base_norm_squared)

    def _norms(self) -> Tensor:
        """``row_norms``, computed again only for other numbers while ``DoraCaching`` is on and the layer does not train."""
        if not _caching or self.training:
            self._kept = None
            return self.row_norms()
        from_what = [self.lora_A, self.lora_B, self.base_norm_squared, *self.innermost._parameters.values()]
        key = (self.scaling, *((id(t), t._version, t.dtype, t.device) for t in from_what if t is not None))
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.row_norms()
        return self._kept[1]

    def delta_weight(self) -> Tensor:
        weight = dense_weight(self.innermost).float()
        ratio, moves = self._ratio()
        return ratio[..., None] * (weight + moves[..., None] * super().delta_weight()) - weight

    def reset(self) -> None:
        super().reset()
        self.lora_magnitude_vector.copy_(self.over_outputs(self.row_norms()))

    def as_lora(self) -> tuple[Tensor, Tensor]:
        raise StateError(
            "DoRA rescales every row of the weight, so its update has full rank and is no plain LoRA; merge it instead"
        )


class DoraCaching:
    """Inside the block, or from ``DoraCaching()(enabled=True)`` on, the row norms of DoRA layers in eval mode are computed once.

    They are computed again when a factor, the scaling or the base weight was written since, so the result is the same; it costs ``[out]``
    fp32 a layer.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._before: list[bool] = []

    def __enter__(self) -> DoraCaching:
        self._before.append(_caching)
        self(self.enabled)
        return self

    def __exit__(self, *_: object) -> None:
        self(self._before.pop())

    def __call__(self, enabled: bool = True) -> None:
        global _caching
        _caching = enabled

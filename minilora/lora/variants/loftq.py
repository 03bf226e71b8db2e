"""LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1): quantize and factorise in turns, so that ``Q + s B A`` is close to ``W``.

    repeat:  Q = quantize(W - s B A);   s B A = best rank-r part of (W - Q)

PEFT forgets to divide the factors by the scaling ``s``; at lora_alpha = 2 r its correction is then exactly as large as the error that it
leaves. The error need not fall at every turn, so the best turn is kept. Below four bits the scales of the blocks are searched
(``scales.py``); inside ``calibrated`` an error counts with the E[x^2] of its input channel, in the search and in the factors alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minilora.errors import QuantizationError
from minilora.linear.layers import QuantLinear, dense_weight, is_quantized
from minilora.lora.adapter import register
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear
from minilora.lora.starts import LoftQConfig, settings
from minilora.quant.blockwise import quantize
from minilora.quant.config import QuantConfig
from minilora.quant.quantized import QuantizedTensor
from minilora.quant.stack import QuantizedStack, quantize_stack

Packed = QuantizedTensor | QuantizedStack

_importance: ContextVar[Mapping[str, Tensor] | None] = ContextVar("importance", default=None)


@contextmanager
def calibrated(importance: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block new LoftQ layers weigh errors by what ``minilora.calibrate`` returned: path to E[x^2], ``[in]``."""
    token = _importance.set(importance)
    try:
        yield
    finally:
        _importance.reset(token)


def _importance_of(path: str) -> Tensor | None:
    known = _importance.get()
    if known is not None and path not in known:
        raise QuantizationError(f"{path}: calibrated() has no importance for it; calibrate the same model and layers")
    return None if known is None else known[path]


def loftq(
    weight: Tensor,
    config: QuantConfig,
    r: int,
    scaling: float,
    rounds: int = 5,
    name: str = "weight",
    importance: Tensor | None = None,
) -> tuple[Packed, Tensor, Tensor]:
    """``(Q, A [r, in], B [out, r])`` of the best of ``rounds`` turns by the norm of ``(W - (Q + scaling B A)) D``.

    Args:
        weight: ``[out, in]``, any floating dtype; of experts ``[E, out, in]``, with factors for each and one best turn for all.
        config: any format. r, scaling: of the adapter.
        importance: E[x^2] per input, ``[in]``; ``D`` is the diagonal of its root, and the identity without it.
    """
    wide = weight.detach().float()
    heavy = _column_weights(wide, importance)
    low = torch.zeros_like(wide)
    best: tuple[float, Packed, Tensor, Tensor] | None = None
    for _ in range(rounds):
        left = wide - low
        packed = quantize(left, config, name, importance) if left.dim() == 2 else quantize_stack(left, config, name)
        A, B = best_factors((wide - packed.dequantize(torch.float32)) * heavy, r, scaling)
        A = A / heavy
        low = scaling * (B @ A)
        error = float(((wide - packed.dequantize(torch.float32) - low) * heavy).norm())
        if best is None or error < best[0]:
            best = (error, packed, A, B)
    assert best is not None  # rounds >= 1 is validated
    return _as_of(best[1], weight.dtype), best[2], best[3]


def _as_of(packed: Packed, dtype: torch.dtype) -> Packed:
    """The same, of a weight of this dtype."""
    if isinstance(packed, QuantizedStack):
        return replace(packed, stored=replace(packed.stored, dtype=dtype))
    return replace(packed, dtype=dtype)


def best_factors(matrix: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """``(A [r, in], B [out, r])`` for which ``scaling * B A`` is the best rank-r part of ``[out, in]`` (or each), split evenly."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (S[..., :r] / scaling).sqrt()
    return root[..., :, None] * Vh[..., :r, :], U[..., :r] * root[..., None, :]


def _column_weights(weight: Tensor, importance: Tensor | None) -> Tensor:
    """The root of the importance, its mean 1; all ones without it, or where no input ever spoke."""
    if importance is None or not importance.any():
        return weight.new_ones(weight.shape[-1])
    heavy = importance.to(weight).clamp(min=1e-4 * float(importance.mean())).sqrt()
    return heavy / heavy.mean()


@register("loftq")
class LoftQLinear(LoRALinear):
    """LoRA on a base layer that it quantizes itself: the slot's base becomes a ``QuantLinear``, and ``B A`` makes up for the error.

    At the start the layer is close to the dense one, not equal to its quantized base. On a base that is packed already (a reloaded
    model) it is plain LoRA, whose factors come from the file.
    """

    replaces_base: ClassVar[bool] = True
    wants_file: str = (
        "is packed already, and LoftQ packs its base layer itself, to make up for the error; give it the dense model (a saved "
        "adapter may be loaded onto a packed one)"
    )

    def __init__(self, base_layer: nn.Module, config: LoraConfig, path: str = "") -> None:
        super().__init__(base_layer, config, path)
        if not is_quantized(base_layer):
            chosen = settings("loftq_config", config.loftq_config, LoftQConfig) or LoftQConfig()
            bits, rounds = chosen.loftq_bits, chosen.loftq_iter
            seen = _importance_of(path)
            scale = "weighted" if seen is not None else "absmax" if bits == 4 else "mse"
            form = QuantConfig(f"nf{bits}", scale=scale)
            packed, A, B = loftq(dense_weight(base_layer), form, self.r, self.scaling, rounds, path + ".weight", seen)
            self.base_layer = self.around(packed, base_layer).train(base_layer.training)
            self.base_replaced, self.wants_file = True, ""
            if seen is not None:
                self.made_with = hashlib.sha256(seen.detach().cpu().float().numpy().tobytes()).hexdigest()
            self.lora_A, self.lora_B = nn.Parameter(A.contiguous()), nn.Parameter(B.contiguous())

    def around(self, packed: Any, layer: nn.Module) -> nn.Module:
        """The packed layer that takes the place of a dense one."""
        return QuantLinear(packed, layer.bias)  # type: ignore[arg-type]

    def initial_factors(self, config: LoraConfig) -> tuple[Tensor, Tensor, Tensor | None]:
        return super().initial_factors(replace(config, init_lora_weights=True))

"""Getting a packed model ready to train, in the way that code written for PEFT expects.

minilora needs no such call: packed weights are frozen as they are made. What remains is a choice of precision. bf16 norms lose small
updates of the residual stream; computed in fp32 they cost next to nothing, so that is what is offered. PEFT casts *every* floating
parameter to fp32, the embedding and the output head with them, which for a large vocabulary takes more memory than four bits saved;
it is there by its name, ``upcast="all"``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, StateError
from minilora.linear.fronts import Front, put_in_front
from minilora.linear.frozen import dtype_after
from minilora.linear.layers import is_foreign, stored_weight
from minilora.lora.bases import refuse_nested
from minilora.lora.change import LOCK, Change
from minilora.lora.slots import has_adapters

__all__ = ["checkpoint_activations", "dtype_on_disk", "prepare_model_for_kbit_training"]

_HALF = (torch.float16, torch.bfloat16)


class _InFloat32(Front):
    """Put in front of a norm's class: computes in its own dtype and hands on the one that it was given.

    A model that casts to the norm's own dtype (Mamba) gives it fp32, and gets back what the norm had before it was raised.
    """

    given_dtype: torch.dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = super().forward(x.to(self.weight.dtype), *args, **kwargs)  # type: ignore[arg-type]
        return out.to(self.given_dtype if x.dtype == torch.float32 else x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.given_dtype = dtype_after(fn, self.given_dtype, self.weight.device)  # type: ignore[arg-type]
        return super()._apply(fn, recurse)


def dtype_on_disk(module: nn.Module) -> torch.dtype | None:
    """The dtype that a norm had before it was raised to fp32, which its file keeps; None for any other module."""
    return module.given_dtype if isinstance(module, _InFloat32) else None


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    upcast: str = "norms",
) -> Any:
    """Freeze the model, choose what is kept in fp32, and turn gradient checkpointing on; returns the same model.

    Args:
        model: packed or not, without adapters; changed in place.
        use_gradient_checkpointing: keep less for the backward pass and compute it again (transformers models).
        gradient_checkpointing_kwargs: passed on; default ``{"use_reentrant": False}``.
        upcast: "norms" (norms compute in fp32 and return what they were given), "all" (every half-precision parameter becomes fp32,
            as in PEFT), or "none".

    Raises:
        ConfigError: another word for ``upcast``. StateError: the model has adapters, which this would freeze.
    """
    if upcast not in ("norms", "all", "none"):
        raise ConfigError(f"upcast={upcast!r}: wanted 'norms', 'all' (as PEFT) or 'none'")
    if has_adapters(model):
        raise StateError("the model has adapters, which this would freeze; call it before get_peft_model")
    refuse_nested(model.named_modules())
    with LOCK, Change() as change:
        for parameter in model.parameters():
            change.put(parameter, "requires_grad", False)
        for module in model.modules() if upcast == "norms" else ():
            if _is_norm(module) and _halves(module):
                _raise(change, module)
        for parameter in _halves(model) if upcast == "all" else ():
            change.put(parameter, "data", parameter.data.float())
        if use_gradient_checkpointing:
            for module in model.modules():
                change.watch(module)
            checkpoint_activations(model, gradient_checkpointing_kwargs)
    return model


def checkpoint_activations(model: Any, options: dict[str, Any] | None = None) -> None:
    """Recompute activations in the backward pass, by the newer of the two names that transformers has for it.

    Raises:
        StateError: the model has no such switch (transformers' models do).
    """
    options = {"use_reentrant": False} | (options or {})
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    else:
        raise StateError(
            f"{type(model).__name__} cannot checkpoint its activations; leave gradient_checkpointing out (use_gradient_checkpointing=False)"
        )
    if options["use_reentrant"]:  # it passes gradients on only where an input wants one
        model.enable_input_require_grads()


def _is_norm(module: nn.Module) -> bool:
    """By its name (LayerNorm, LlamaRMSNorm, MambaRMSNormGated): one that holds its weight itself and computes nothing else."""
    named = "norm" in type(module).__name__.lower() and not isinstance(module, (nn.Linear, nn.Embedding))
    return named and "weight" in module._parameters and not next(module.children(), None)


def _halves(module: nn.Module) -> list[nn.Parameter]:
    packed = {id(stored_weight(part)) for part in module.modules() if is_foreign(part)}  # bytes, called halves by some
    return [parameter for parameter in module.parameters() if parameter.dtype in _HALF and id(parameter) not in packed]


def _raise(change: Change, norm: Any) -> None:
    kind = norm.weight.dtype
    for parameter in norm.parameters():
        change.put(parameter, "data", parameter.data.float())
    for name, buffer in norm.named_buffers(recurse=False):
        if buffer.is_floating_point():
            change.item(norm._buffers, name, buffer.float())
    if not isinstance(norm, _InFloat32):
        change.keep(norm, "__class__")
        put_in_front(norm, _InFloat32)
    change.put(norm, "given_dtype", kind)

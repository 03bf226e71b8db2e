"""What a model answers that is asked for its modules, parameters and state: PEFT's names, the inactive adapters included.

The layers have PEFT's names themselves (``peft/faces.py``); what is added here is ``base_model.model`` above them.
Next file: ``peft/facts.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import StateError
from minilora.lora.slots import adapters_of, has_adapters
from minilora.peft.experts import has_wrapper
from minilora.peft.face import Face

__all__ = ["Shape"]


class Shape(Face):
    """The part of ``PeftModel`` that looks like PEFT's tree of modules."""

    @property
    def base_model(self) -> Any:
        """The ``LoraModel``, whose ``model`` is the model with LoRA layers in it."""
        from minilora.peft.lora_model import LoraModel

        if not has_adapters(self):
            return super().base_model  # type: ignore[misc]
        return LoraModel.of(self)

    def __getattr__(self, name: str) -> Any:
        """``model`` is PEFT's name for the model with LoRA layers in it, where the model itself has no part of that name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name != "model" or not has_adapters(self):
                raise
            return self.base_model.model

    def __setattr__(self, name: str, value: Any) -> None:
        """A ``forward`` that TRL binds to the model finds transformers' ``base_model`` in it (the model without head), and not PEFT's.

        So does the one that accelerate puts around it for mixed precision.
        """
        if name == "forward" and isinstance(value, MethodType) and value.__self__ is self and has_adapters(self):
            known = vars(self).get("forward")
            # TRL's, bound here to the inner model before: the one that comes now was made around it.
            around = isinstance(known, MethodType) and known.__self__ is not self
            if around or "fused_lm_head" in (getattr(value.__func__, "__kwdefaults__", None) or {}):
                value = MethodType(value.__func__, self.base_model.model)
        super().__setattr__(name, value)

    def named_modules(self, memo: set | None = None, prefix: str = "", remove_duplicate: bool = True) -> Iterator[Any]:
        """Path and module of PEFT's tree: ``base_model.model...``."""
        if not has_adapters(self):
            yield from super().named_modules(memo, prefix, remove_duplicate)
            return
        memo = set() if memo is None else memo
        if self not in memo:
            memo.add(self)
            yield prefix, self
            below = f"{prefix}.base_model" if prefix else "base_model"
            yield from self.base_model.named_modules(memo, below, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """``base_model`` alone, as in PEFT. (``children()``, which ``train`` and ``to`` go through, are the model's own.)"""
        if has_adapters(self):
            yield "base_model", self.base_model
        else:
            yield from super().named_children()

    def children(self) -> Iterator[nn.Module]:
        """The model's own."""
        return (child for child in self._modules.values() if child is not None)

    def named_parameters(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Iterator[Any]:
        """``base_model.model...q_proj.lora_A.default.weight`` and the like."""
        if recurse and has_adapters(self):
            below = f"{prefix}.base_model" if prefix else "base_model"
            yield from self.base_model.named_parameters(below, recurse, remove_duplicate)
        else:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The whole model's tensors, all adapters included, under PEFT's names."""
        if not has_adapters(self):
            return super().state_dict(*args, **kwargs)
        return nn.Module.state_dict(_Root(self), *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Tensors under PEFT's names, of any adapters that the model has, inactive ones too.

        Raises:
            StateError: an adapter is merged, and the values of a layer that it is in would become others. Nothing has changed then.
        """
        if not has_adapters(self):
            return super().load_state_dict(state_dict, strict, assign)
        _refuse_into_merged(self, state_dict)
        return nn.Module.load_state_dict(_Root(self), state_dict, strict, assign)


def _refuse_into_merged(model: Any, state_dict: Mapping[str, Any]) -> None:
    """What is written into a merged layer is lost when it is unmerged, and what is written into its adapter counts only then."""
    adapters = adapters_of(model)
    merged = [slot for slot in adapters.slots.values() if slot.merged is not None]
    homes = [slot.path.rpartition(".")[0] if has_wrapper(slot, adapters) else slot.path for slot in merged]
    places = tuple(f"base_model.model.{path}." for path in homes)
    for key, own in model.state_dict().items() if places else ():
        if not key.startswith(places) or key not in state_dict:
            continue
        new = state_dict[key]
        if isinstance(new, Tensor) and new.shape == own.shape and not torch.equal(new.to(own.device, own.dtype), own):
            raise StateError(
                f"adapters {list(adapters.merged)} are merged, and the state dict has another {key}; unmerge_adapter() first, and load "
                "a state dict that was taken unmerged"
            )


class _Root(nn.Module):
    """What stands above ``base_model`` in PEFT's tree."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._modules["base_model"] = model.base_model


_Root.__name__ = "PeftModel"  # so torch's message of a state dict that does not fit names it

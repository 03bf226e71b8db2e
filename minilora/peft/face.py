"""How a model gets PEFT's methods and loses them: a class put before its own, and taken away again. Next file: ``peft/peft_model.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from minilora.errors import StateError
from minilora.linear.fronts import Front, is_on_top, put_in_front, take_from_front
from minilora.linear.layers import compute_dtype
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.change import Change
from minilora.lora.copies import in_given_dtype
from minilora.lora.slot import Value, own_parameters
from minilora.lora.slots import adapters_of, has_adapters, unwrapped
from minilora.lora.variants.alora import activated
from minilora.many import batched

__all__ = ["Face", "extend", "in_base_dtype", "refuse_extended", "refuse_second", "restore"]


class Face(Front):
    """Base of the classes that carry PEFT's methods."""


class Generates(Front):
    """For a model that has ``generate``; one without it must not seem to have it."""

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own ``generate``; with ``adapter_names`` each prompt gets its own adapter."""
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        with activated(self, prompt) if adapter_names is None else batched.batch_adapters(self, adapter_names):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def extend(change: Change, model: nn.Module, face: type[Face]) -> None:
    """Put ``face`` in front of the object's class, under the old name: transformers looks classes up by name."""
    inner = unwrapped(model)
    if not isinstance(inner, Face):  # its adapters may have been taken out by the plain function
        change.keep(inner, "__class__")
        if hasattr(inner, "generate"):
            put_in_front(inner, Generates)
        put_in_front(inner, face)


def refuse_second(model: nn.Module) -> None:
    """Raise ``StateError`` where a model has adapters already."""
    if has_adapters(model):
        names = list(adapters_of(model).configs)
        raise StateError(f"the model has adapters {names} already; unload() or merge_and_unload() them first")


def refuse_extended(model: nn.Module) -> None:
    """Before anything is taken out: the class must be the one that ``extend`` made, or its past cannot be told from another's."""
    if not is_on_top(Face, model):
        raise StateError(
            f"{type(model).__name__}: its class was extended after get_peft_model (FSDP2 does so), so it cannot be restored; unload "
            "before that, or take the adapters out and leave the class with minilora.unload(model)"
        )


def restore(change: Change, model: nn.Module) -> None:
    """Undo ``extend``."""
    change.keep(model, "__class__")
    take_from_front(model, Face, Generates)


def in_base_dtype(model: nn.Module, values: Mapping[str, Value]) -> None:
    """What a new adapter trains goes into the dtype of the layer that it belongs to (``autocast_adapter_dtype=False``)."""
    bare = Bare(model)
    for path, value in values.items():
        if isinstance(value, Adapter):
            for parameter in (*own_parameters(value), *(value._parameters[name] for name in value.fixed)):
                parameter.data = parameter.data.to(compute_dtype(value.innermost))  # type: ignore[union-attr]
        elif isinstance(value, nn.Module):
            in_given_dtype(value)
        else:
            value.data = value.data.to(bare.get_parameter(path).dtype)

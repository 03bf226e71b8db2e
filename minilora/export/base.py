"""What an export has to know of the base model beside the adapter. Next file: ``export/plain_peft.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilora.lora.adapter import Adapter
from minilora.lora.variants.embedding import TiedHead
from minilora.store.adapter_files import Stored

__all__ = ["Base"]


def _same_table(table: Any, head: Any) -> bool:
    """Whether head and embedding are one weight, or a copy (``untie``): a program that loads the published base has one for both then."""
    layers = [each.innermost if isinstance(each, Adapter) else each for each in (table, head)]
    one, other = (getattr(layer, "weight", None) for layer in layers)
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


@dataclass(frozen=True)
class Base:
    """What is known of the base model.

    Attributes:
        model_type: of its config, "" for unknown. tied: whether its head is its embedding, or was; None for unknown.
        head: the path of its head. head_follows: whether a tied head has the update of its embedding's adapter.
        model_class: the class's name and the library that it is from.
    """

    model_type: str = ""
    tied: bool | None = None
    head: str = "lm_head"
    head_follows: bool = False
    model_class: tuple[str, str] = ("", "")

    @classmethod
    def of(cls, model: nn.Module, values: Mapping[str, object]) -> Base:
        """Of a model in memory with these adapters."""
        kind = next(c for c in type(model).__mro__ if not c.__module__.startswith("minilora"))
        table, head = (getattr(model, f"get_{end}put_embeddings", lambda: None)() for end in ("in", "out"))
        names = [name for name, module in model.named_modules() if head is not None and module is head]
        return cls(
            str(getattr(getattr(model, "config", None), "model_type", "") or ""),
            _same_table(table, head),
            names[0] if names else "",
            any(isinstance(value, TiedHead) for value in values.values()),
            (kind.__name__, kind.__module__.partition(".")[0]),
        )

    @classmethod
    def stored(cls, stored: Stored) -> Base:
        """Of an adapter folder alone."""
        name, module = stored.model_class
        kind = "gpt2" if stored.config.fan_in_fan_out else ""  # the one architecture that keeps its weights so
        return cls(kind, model_class=(name, module.partition(".")[0]))

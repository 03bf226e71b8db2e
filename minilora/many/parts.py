"""What several adapters hold at each place, sorted by what can be done with it: ``combine.py`` makes one adapter of them.

Low-rank updates of a layer are combined there. Token rows and biases are summed here as the updates that they are. A copy of a module is
no update; one can be taken over, two cannot be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import StateError
from minilora.linear.layers import dense_weight
from minilora.lora.adapter import Adapter
from minilora.lora.layer import LoRALinear
from minilora.lora.slot import Value
from minilora.lora.slots import Adapters
from minilora.lora.targets import inside
from minilora.lora.variants.embedding import LoRAEmbedding, Tied
from minilora.lora.variants.tokens import TokenRows

__all__ = ["Parts", "sorted_parts"]


@dataclass
class Parts:
    """By path: the low-rank updates and the trained rows and biases with their weights, and the copies."""

    low: dict[str, list[tuple[Adapter, float]]] = field(default_factory=dict)
    rows: dict[str, list[tuple[TokenRows, float]]] = field(default_factory=dict)
    biases: dict[str, list[tuple[nn.Parameter, float]]] = field(default_factory=dict)
    copies: dict[str, nn.Module] = field(default_factory=dict)

    def token_indices(self) -> dict[str, Sequence[int]]:
        """By path every row that one of them trains."""
        each = {
            path: [i for rows, _ in parts for i in rows.token_indices.tolist()] for path, parts in self.rows.items()
        }
        return {path: sorted(set(indices)) for path, indices in each.items()}

    def bias(self, record: Adapters, names: Sequence[str]) -> str:
        """The kind of bias that has a place for every bias here."""
        kinds = {record.configs[name].bias for name in names} if self.biases else {"none"}
        return "all" if "all" in kinds else "lora_only" if "lora_only" in kinds else "none"

    def fill(self, path: str, value: Value) -> None:
        """Write what these parts say at ``path`` into a new value that holds the base's numbers: rows, a bias, or a copy."""
        if isinstance(value, TokenRows):
            value.trainable_tokens_delta.copy_(self._summed_rows(path, value))
        elif isinstance(value, nn.Parameter):
            base = value.clone()
            for bias, weight in self.biases.get(path, ()):
                value.add_(weight * (bias.to(value) - base))
        elif isinstance(value, nn.Module) and not isinstance(value, Tied) and path in self.copies:
            value.load_state_dict(self.copies[path].state_dict())

    def _summed_rows(self, path: str, target: TokenRows) -> Tensor:
        table = dense_weight(target.innermost)
        summed: dict[int, Tensor] = {}
        for rows, weight in self.rows[path]:
            for i, row in zip(rows.token_indices.tolist(), rows.trainable_tokens_delta, strict=True):
                summed[i] = summed.get(i, table[i].float()) + weight * (row.float() - table[i].float())
        return torch.stack([summed[i] for i in target.token_indices.tolist()])


def sorted_parts(record: Adapters, names: Sequence[str], weights: Sequence[float]) -> Parts:
    """All that these adapters hold.

    Raises:
        StateError: an update that is not low-rank, or a module of which several of them train a copy.
    """
    parts = Parts()
    copied_by: dict[str, str] = {}
    for name, weight in zip(names, map(float, weights), strict=True):
        for path, value in record.named(name).items():
            if isinstance(value, nn.Parameter):
                parts.biases.setdefault(path, []).append((value, weight))
            elif isinstance(value, TokenRows):
                parts.rows.setdefault(path, []).append((value, weight))
            elif isinstance(value, Adapter):
                if not isinstance(value, Tied):  # follows its source
                    parts.low.setdefault(path, []).append((_plain(value, name, path), weight))
            elif path in copied_by:
                raise StateError(
                    "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
                    f"{path}, copied by {copied_by[path]!r} and {name!r}; leave one of them out"
                )
            else:
                parts.copies[path], copied_by[path] = value, name
    for path in (*parts.low, *parts.rows, *parts.biases):
        if (copied := inside(path, copied_by)) is not None:
            raise StateError(
                f"{path}: one of the adapters {list(names)} changes it, and {copied_by[copied]!r} trains a copy of {copied}, in which it "
                "is; they cannot be added, combine others"
            )
    if not parts.low:
        raise StateError(f"adapters {list(names)} have no low-rank update, so there is nothing to combine; name others")
    return parts


def _plain(value: Any, name: str, path: str) -> Adapter:
    """The adapter if it is nothing but a low-rank update."""
    if getattr(value.innermost, "groups", 1) > 1:
        raise StateError(
            f"{path}: its convolution has groups, and the factors of several adapters cannot be put together there; merge them one by one"
        )
    try:
        value.as_lora()
    except StateError as error:
        raise StateError(f"adapter {name!r}, {path}: {error}") from None
    if not isinstance(value, (LoRALinear, LoRAEmbedding)):
        raise StateError(
            f"adapter {name!r} has a {type(value).__name__} at {path}, whose factors cannot be combined; merge it instead"
        )
    return value

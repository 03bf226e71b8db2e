"""Where a weight of transformers lies in a GGUF file: its name there, and the order of its rows. One table of what is tested.

The names are those of the ``gguf`` package's own maps, which llama.cpp's converter uses too. What no map says is that the converter turns
rows of some weights around, so that llama.cpp finds them as its kernels want them: ``W_gguf = W[order]``. A LoRA follows its weight:
``(W + B A)[order] = W[order] + B[order] A``, so that only B turns. An architecture that stands not in ``TESTED`` is refused, because a
wrong order is no error anywhere: it is a model that answers nonsense. Next file: ``gguf/lora.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from minilora.errors import CheckpointError
from minilora.files.validate import shown
from minilora.gguf.file import GGUF
from minilora.gguf.kinds import import_gguf

__all__ = ["TESTED", "Architecture", "Names", "Place", "names_in"]

Order = Callable[[int, int, int], Tensor]  # of (rows, heads, heads of keys and values)


def _halves_together(rows: int, heads: int) -> Tensor:
    """Rotary pairs ``(i, i + d/2)`` of a head, as transformers turns them, to neighbours ``(2i, 2i + 1)``, as llama.cpp does here."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def _queries(rows: int, heads: int, kv_heads: int) -> Tensor:
    return _halves_together(rows, heads)


def _keys(rows: int, heads: int, kv_heads: int) -> Tensor:
    return _halves_together(rows, kv_heads)


def _by_kind(rows: int, heads: int, kv_heads: int) -> Tensor:
    """q, k and v of each head, one head after the other, to all q, all k, all v."""
    return torch.arange(rows).view(heads, 3, -1).transpose(0, 1).flatten()


def _by_group(rows: int, heads: int, kv_heads: int) -> Tensor:
    """Groups of several queries with their one key and value, to all q, all k, all v."""
    groups = torch.arange(rows).view(kv_heads, heads // kv_heads + 2, -1)
    return torch.cat([groups[:, :-2].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()])


@dataclass(frozen=True)
class Architecture:
    """What a GGUF file of one architecture makes of the weights.

    Attributes:
        model_types: of transformers, whose models such a file holds.
        orders: endings of paths to the order of the rows of weight and bias; all others stay as they are.
        norms: what is added to the weight of every norm, because the model of transformers adds it as it computes.
    """

    model_types: tuple[str, ...]
    orders: Mapping[str, Order] = field(default_factory=dict)
    norms: float = 0.0


_ROTARY: Mapping[str, Order] = {"q_proj": _queries, "k_proj": _keys}

TESTED: dict[str, Architecture] = {
    "llama": Architecture(("llama", "mistral"), _ROTARY),
    "smollm3": Architecture(("smollm3",), _ROTARY),
    "granite": Architecture(("granite",), _ROTARY),
    "qwen2": Architecture(("qwen2",)),
    "qwen3": Architecture(("qwen3",)),
    "qwen2moe": Architecture(("qwen2_moe",)),
    "qwen3moe": Architecture(("qwen3_moe",)),
    "olmoe": Architecture(("olmoe",)),
    "olmo2": Architecture(("olmo2",)),
    "gemma": Architecture(("gemma",), norms=1.0),
    "gemma2": Architecture(("gemma2",), norms=1.0),
    "gemma3": Architecture(("gemma3_text",), norms=1.0),
    "phi2": Architecture(("phi",)),
    "phi3": Architecture(("phi3",)),
    "starcoder2": Architecture(("starcoder2",)),
    "stablelm": Architecture(("stablelm",)),
    "command-r": Architecture(("cohere",)),
    "gpt2": Architecture(("gpt2",)),
    "gptneox": Architecture(("gpt_neox",), {"query_key_value": _by_kind}),
    "falcon": Architecture(("falcon",), {"query_key_value": _by_group}),
}
_HEAD = "output"
# Projections of experts that transformers keeps in one parameter and llama.cpp may keep apart.
_EXPERTS = {
    "gate_up_proj": (("ffn_gate_up_exps",), ("ffn_gate_exps", "ffn_up_exps")),
    "down_proj": (("ffn_down_exps",),),
}


@dataclass(frozen=True)
class Place:
    """A tensor of a file, and which rows of the weight of transformers it holds, in its own order; None for all as they are."""

    name: str
    rows: Tensor | None = None

    def of(self, weight: Tensor, dim: int = 0) -> Tensor:
        """What the file holds of ``weight`` or of a factor of it, whose rows are dimension ``dim``."""
        return weight if self.rows is None else weight.index_select(dim, self.rows.to(weight.device))


@dataclass(frozen=True)
class Names:
    """The names of one model.

    Attributes:
        architecture: as ``general.architecture`` has it. blocks, heads, kv_heads: how many. said: who says so, for messages.
    """

    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    said: object = "the model"

    def __post_init__(self) -> None:
        if self.architecture not in TESTED:
            raise CheckpointError(
                f"{self.said}: the names of a GGUF of architecture {shown(self.architecture)} are not tested; "
                f"wanted one of {', '.join(sorted(TESTED))}"
            )

    @property
    def known(self) -> Architecture:
        """Its line of the table."""
        return TESTED[self.architecture]

    @cached_property
    def _map(self) -> Any:
        gguf = import_gguf()
        number = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[self.architecture]
        return gguf.get_tensor_name_map(number, self.blocks)

    def place(self, path: str, rows: int, suffix: str = ".weight") -> Place:
        """Of the weight (or bias) of the module at ``path``, with so many rows.

        Raises:
            CheckpointError: no file of this architecture has such a weight, or the rows are no whole number of heads.
        """
        if (name := self.tensor(path)) is None:
            raise CheckpointError(f"{path}: a GGUF of architecture {self.architecture} has no tensor for it")
        return Place(name + suffix, self._order(path, rows))

    def tensor(self, path: str) -> str | None:
        """What a file calls the module at ``path``, without ``.weight``; None for one that it has no name for."""
        found: str | None = self._map.get_name(path)
        # The table of tokens is the only head of Gemma and Command-R, which have no name for it.
        return _HEAD if found is None and path.rpartition(".")[2] == "lm_head" else found

    def experts(self, path: str, rows: int, has: Callable[[str], bool]) -> list[Place]:
        """Of a projection of experts, whose path ends in its name: one tensor, or two with half the rows each.

        Args:
            has: whether the file has a tensor of this name.
        """
        full = self.of_experts(path, has)
        if not full:
            raise CheckpointError(f"{path}: {self.said} has no tensor for these experts")
        parts = torch.arange(rows).chunk(len(full))
        return [Place(name, part if len(full) > 1 else None) for name, part in zip(full, parts, strict=True)]

    def of_experts(self, path: str, has: Callable[[str], bool]) -> list[str]:
        """The tensors that together hold a projection of experts, the rows of the first one first; none where there are not all."""
        home, _, projection = path.rpartition(".")
        block = next((part for part in home.split(".") if part.isdigit()), "")
        for names in _EXPERTS.get(projection, ()):
            full = [f"blk.{block}.{name}.weight" for name in names]
            if all(map(has, full)):
                return full
        return []

    def _order(self, path: str, rows: int) -> Tensor | None:
        order = next((order for ending, order in self.known.orders.items() if path.endswith(ending)), None)
        if order is None:
            return None
        try:
            return order(rows, self.heads, self.kv_heads)
        except RuntimeError:
            heads = f"{self.heads} heads and {self.kv_heads} of keys and values"
            raise CheckpointError(f"{path}: {rows} rows are not those of {heads}, which {self.said} has") from None


def names_in(file: GGUF) -> Names:
    """Of a GGUF file. Raises ``CheckpointError`` where its architecture is not tested, or it does not say how many heads there are."""
    kind = file.architecture
    if kind not in TESTED:
        return Names(kind, 0, 0, 0, file.path)  # which raises
    heads = _whole(file, f"{kind}.attention.head_count")
    kv_heads = _whole(file, f"{kind}.attention.head_count_kv", heads)
    return Names(kind, _whole(file, f"{kind}.block_count"), heads, kv_heads, file.path)


def _whole(file: GGUF, name: str, default: int = 0) -> int:
    found = file.count(name, default) or 0
    if found < 1:
        raise CheckpointError(
            f"{file.path}: its metadata has no {name}; wanted a whole number, the same for all layers"
        )
    return found

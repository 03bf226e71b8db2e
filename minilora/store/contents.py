"""What an adapter folder holds, told from its tensors alone: which layers, with which rank and scaling, and how large each update is.

No base model is loaded, and no update is formed: ``||s B A||^2 = s^2 sum((B^T B) * (A A^T))`` (Frobenius) takes the two matrices ``[r, r]``
only. Next file: ``store/export.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.lora.adapter import Adapter, variant, variants_on
from minilora.lora.layer import LoRALinear
from minilora.lora.variants.embedding import LoRAEmbedding
from minilora.store.adapter_files import PREFIX, Stored

__all__ = ["Layer", "by_factors", "layers_in", "others_in", "update_norm"]

_KINDS = ("linear", "embedding", "convolution", "attention")
_INNER = ".base_layer"  # of a part that has its adapter inside another one


@dataclass(frozen=True)
class Layer:
    """One adapted layer.

    Attributes:
        path: in the model. r: rank. scaling: factor of the update. norm: Frobenius norm of the update, scaling included; None where it
            depends on the base's weights. untrained: whether a factor is all zeros, so that the layer is as it was.
    """

    path: str
    r: int
    scaling: float
    norm: float | None
    untrained: bool

    @property
    def kind(self) -> str:
        """The last part of its path, such as ``q_proj``."""
        return self.path.rpartition(".")[2]


def layers_in(stored: Stored) -> list[Layer]:
    """Every adapted layer of a stored adapter, in the order of the file."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.tensors.items():
        if (found := _split(key)) is not None:
            parts.setdefault(found[0], {})[found[1]] = tensor
    return [_layer(stored, path, own) for path, own in parts.items()]


def others_in(stored: Stored) -> dict[str, int]:
    """What is in the file besides low-rank updates (copies of modules, biases, rows of tokens): module to count of its numbers."""
    counts: dict[str, int] = {}
    for key, tensor in stored.tensors.items():
        if _split(key) is None:
            owner = key.removeprefix(PREFIX).rpartition(".")[0].replace(_INNER, "").removesuffix(".token_adapter")
            counts[owner] = counts.get(owner, 0) + tensor.numel()
    return counts


def update_norm(A: Tensor, B: Tensor, scaling: float) -> float:
    """``||scaling * B A||`` (Frobenius) of ``A [r, ...]`` and ``B [out, r / groups, ...]``, in double precision."""
    groups = max(1, len(A) // max(1, B.shape[1]))
    total = torch.zeros((), dtype=torch.float64)
    for rows, columns in zip(A.chunk(groups), B.chunk(groups), strict=True):
        a, b = rows.double().flatten(1), columns.double().flatten(1)
        total += ((b.T @ b) * (a @ a.T)).sum()
    return abs(scaling) * float(total.clamp(min=0).sqrt())


def _split(key: str) -> tuple[str, str] | None:
    """``(path of the layer, what its variant calls the tensor)``; None for what is no part of a low-rank update."""
    name = key.removeprefix(PREFIX)
    for ending in _endings():
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}").replace(_INNER, ""), ending
    return None


def _endings() -> list[str]:
    """The names that variants give their tensors; a row of tokens is no low-rank update."""
    classes: set[type[Adapter]] = {kind for on in _KINDS for kind in variants_on(on).values()}
    names = {name for kind in classes for name in kind.file_names.values()}
    return sorted({name for name in names if "token" not in name}, key=len, reverse=True)


_PAIR = (("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B"))
_START = ("lora_start_A", "lora_start_B")


def _layer(stored: Stored, path: str, own: Mapping[str, Tensor]) -> Layer:
    scaling = stored.config.scaling(path)
    A, B = (next((own[name] for name in names if name in own), None) for names in _PAIR)
    if A is None or B is None:
        return Layer(path, stored.config.for_module(path)[0] if A is None else len(A), scaling, None, False)
    kind: type[Adapter] = LoRAEmbedding if "lora_embedding_A" in own else variant(stored.variant)
    norm = None
    if own.keys() >= set(_START):  # what it started from is in the file, and taken away
        norm = update_norm(torch.cat([A, own[_START[0]]]), torch.cat([B, -own[_START[1]]], 1), scaling)
    elif "lora_magnitude_vector" not in own and by_factors(kind):
        norm = update_norm(A, B, scaling)
    return Layer(path, len(A), scaling, norm, norm == 0 or not B.any())


def by_factors(kind: type[Adapter]) -> bool:
    """Whether the update of this variant is ``scaling * B A``, or is that wherever it acts (aLoRA)."""
    plain = kind.delta_weight in (LoRALinear.delta_weight, LoRAEmbedding.delta_weight)
    return plain or (kind.depends_on_input and issubclass(kind, LoRALinear))

"""What an adapter folder holds, told from its tensors alone: which layers, with which rank and scaling, and how large each update is.

No base model is loaded, and no update is formed: ``||s B A||^2 = s^2 sum((B^T B) * (A A^T))`` (Frobenius) takes the two matrices ``[r, r]``
only. Next file: ``store/export.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.linear.experts.known import declared
from minilora.lora.adapter import Adapter, variant, variants_on
from minilora.lora.layer import LoRALinear
from minilora.lora.targets import ends_with
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
    names = _named_parameters(stored, parts)
    return [
        _experts(stored, names[path], own) if path in names else _layer(stored, path.replace(_INNER, ""), own)
        for path, own in parts.items()
    ]


def _named_parameters(stored: Stored, paths: Iterable[str]) -> dict[str, str]:
    """What the parameters that ``target_parameters`` names are called in the model: those of one module lie in each other in a file, the
    first that the module declares innermost.
    """
    wanted = [name.rpartition(".")[::2] for name in stored.config.target_parameters or ()]
    found, owners = {}, {path.replace(_INNER, "") for path in paths}
    for owner in owners:
        held = {name for place, name in wanted if not place or ends_with(owner, place)}
        for depth, name in enumerate(reversed(declared(held))):
            found[owner + _INNER * depth] = f"{owner}.{name}"
    return found


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
    """``(path of the layer in the file, what its variant calls the tensor)``; None for what is no part of a low-rank update."""
    name = key.removeprefix(PREFIX)
    for ending in _endings():
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), ending
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


def _experts(stored: Stored, path: str, own: Mapping[str, Tensor]) -> Layer:
    """As ``_layer``, of a parameter that may hold many experts: each has ``r`` rows of A, and every E-th column of B."""
    r, A, B = stored.config.for_module(path)[0], own.get("lora_A.weight"), own.get("lora_B.weight")
    if A is None or B is None or len(A) == r or len(A) % r or B.shape[1] != len(A):
        return _layer(stored, path, own)
    E = len(A) // r
    each = [
        _layer(stored, path, {**{name: tensor[e] for name, tensor in own.items() if len(tensor) == E},
                              "lora_A.weight": A[e * r : (e + 1) * r], "lora_B.weight": B[:, e::E]})
        for e in range(E)
    ]  # fmt: skip
    norms = [layer.norm for layer in each if layer.norm is not None]
    norm = math.sqrt(sum(norm**2 for norm in norms)) if len(norms) == E else None
    return Layer(path, r, each[0].scaling, norm, all(layer.untrained for layer in each))


def by_factors(kind: type[Adapter]) -> bool:
    """Whether the update of this variant is ``scaling * B A``, or is that wherever it acts (aLoRA)."""
    plain = kind.delta_weight in (LoRALinear.delta_weight, LoRAEmbedding.delta_weight)
    return plain or (kind.depends_on_input and issubclass(kind, LoRALinear))

"""What an adapter folder holds, told from its tensors alone: which layers, with which rank and scaling, and how large each update is.

No base model is loaded, and no update is formed: ``||s B A||^2 = s^2 sum((B^T B) * (A A^T))`` (Frobenius) takes the two matrices ``[r, r]``
only. Which tensors are those of experts, the config says (``target_parameters``). Next file: ``export/folders.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.linear.experts.known import declared
from minilora.lora.adapter import Adapter, variant, variants_on
from minilora.lora.layer import LoRALinear
from minilora.lora.targets import ends_with
from minilora.lora.variants.embedding import LoRAEmbedding
from minilora.lora.variants.experts import from_file
from minilora.store.adapter_files import PREFIX, PROJECTIONS, Stored

__all__ = ["Layer", "by_factors", "layer_of", "layers_in", "others_in", "parameters_in", "part_of", "update_norm"]

_KINDS = ("linear", "embedding", "convolution", "attention", "experts", "router")
_INNER = ".base_layer"  # of a part that has its adapter inside another one


@dataclass(frozen=True)
class Layer:
    """One adapted layer.

    Attributes:
        path: in the model; of experts their projection's. r: rank; of experts each one's. scaling: factor of the update.
        norm: Frobenius norm of the update, scaling included; None where it depends on the base's weights.
        untrained: whether a factor is all zeros, so that the layer is as it was. experts: how many share the layer, 0 where it is its own.
    """

    path: str
    r: int
    scaling: float
    norm: float | None
    untrained: bool
    experts: int = 0

    @property
    def kind(self) -> str:
        """The last part of its path, such as ``q_proj``."""
        return self.path.rpartition(".")[2]


def layers_in(stored: Stored) -> list[Layer]:
    """Every adapted layer of a stored adapter, in the order of the file."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.tensors.items():
        if (found := part_of(key)) is not None:
            parts.setdefault(found[0], {})[found[1]] = tensor
    names = parameters_in(stored)
    return [
        layer_of(stored, names.get(path, path.replace(_INNER, "")), own, path in names) for path, own in parts.items()
    ]


def parameters_in(stored: Stored) -> dict[str, str]:
    """Of the experts in a stored adapter: what the file calls each projection -> its path in the model.

    A file nests the adapters of one module of experts, the first projection innermost (``lora/variants/experts.py``).
    """
    entries = [entry.rpartition(".") for entry in stored.config.target_parameters or ()]
    depths: dict[str, int] = {}
    for key, tensor in stored.tensors.items():
        path, name = part_of(key) or ("", "")
        home, joined = _home(path), name == "lora_A.weight" and len(tensor) != stored.config.for_module(path)[0]
        # A name without its owner could be anybody's: then the rank tells, which is that of all experts together.
        means = any(
            (ends_with(home, owner) if owner else joined) and (joined or attr != "weight") for owner, _, attr in entries
        )
        if means and not _is_module(stored, home):
            depths[home] = max(depths.get(home, 0), path.count(_INNER))
    found: dict[str, str] = {}
    for home, depth in depths.items():
        own = declared({name for owner, _, name in entries if not owner or ends_with(home, owner)})
        for at, name in enumerate(reversed(own[-depth - 1 :] if len(own) > depth else own)):
            found[home + _INNER * at] = f"{home}.{name}"
    return found


def _home(path: str) -> str:
    return path[: path.index(_INNER)] if _INNER in path else path


def _is_module(stored: Stored, path: str) -> bool:
    """Whether ``target_modules`` means this path."""
    wanted = stored.config.target_modules
    return not isinstance(wanted, str) and any(ends_with(path, entry) for entry in wanted or ())


def others_in(stored: Stored) -> dict[str, int]:
    """What is in the file besides low-rank updates (copies of modules, biases, rows of tokens): module to count of its numbers."""
    counts: dict[str, int] = {}
    for key, tensor in stored.tensors.items():
        if part_of(key) is None and key not in PROJECTIONS:
            owner = key.removeprefix(PREFIX).rpartition(".")[0].replace(_INNER, "").removesuffix(".token_adapter")
            counts[owner] = counts.get(owner, 0) + tensor.numel()
    return counts


def update_norm(A: Tensor, B: Tensor, scaling: float, experts: bool = False) -> float:
    """``||scaling * B A||`` (Frobenius) of ``A [r, ...]`` and ``B [out, r / groups, ...]``, in double precision; of experts
    ``A [E, r, in]`` and ``B [E, out, r]``.
    """
    groups = max(1, len(A) // max(1, B.shape[1]))
    total = torch.zeros((), dtype=torch.float64)
    for rows, columns in zip(A, B, strict=True) if experts else zip(A.chunk(groups), B.chunk(groups), strict=True):
        a, b = rows.double().flatten(1), columns.double().flatten(1)
        total += ((b.T @ b) * (a @ a.T)).sum()
    return abs(scaling) * float(total.clamp(min=0).sqrt())


def part_of(key: str) -> tuple[str, str] | None:
    """``(path of the layer in the file, what its variant calls the tensor)``; None for what is no part of a low-rank update."""
    name = key.removeprefix(PREFIX)
    for ending in _endings():
        if name.endswith(f".{ending}"):
            owner = name.removesuffix(f".{ending}")
            return owner if owner.endswith(_INNER) else owner.replace(_INNER, ""), ending
    return None


def _endings() -> list[str]:
    """The names that variants give their tensors; a row of tokens is no low-rank update."""
    classes: set[type[Adapter]] = {kind for on in _KINDS for kind in variants_on(on).values()}
    names = {name for kind in classes for name in kind.file_names.values()}
    return sorted({name for name in names if "token" not in name}, key=len, reverse=True)


_PAIR = (("lora_A.weight", "lora_embedding_A"), ("lora_B.weight", "lora_embedding_B"))
_START = ("lora_start_A", "lora_start_B")


def layer_of(stored: Stored, path: str, own: Mapping[str, Tensor], experts: bool) -> Layer:
    """One layer from its own tensors, named as ``part_of`` names them; of ``stored`` the config and the variant are asked alone."""
    scaling, r = stored.config.scaling(path), stored.config.for_module(path)[0]
    A, B = (next((own[name] for name in names if name in own), None) for names in _PAIR)
    if A is None or B is None:
        return Layer(path, r if A is None or experts else len(A), scaling, None, False)
    count = len(A) // r if experts else 0
    if experts and (count * r != len(A) or B.dim() != 2 or B.shape[1] != len(A)):
        return Layer(path, r, scaling, None, not B.any(), count)  # the config speaks of another rank
    if experts:
        A, B = from_file("lora_A", A, count), from_file("lora_B", B, count)
    kind: type[Adapter] = LoRAEmbedding if "lora_embedding_A" in own else variant(stored.variant)
    norm = None
    if own.keys() >= set(_START):  # what it started from is in the file, and taken away
        norm = update_norm(torch.cat([A, own[_START[0]]]), torch.cat([B, -own[_START[1]]], 1), scaling)
    elif "lora_magnitude_vector" not in own and by_factors(kind):
        norm = update_norm(A, B, scaling, experts)
    return Layer(path, r if experts else len(A), scaling, norm, norm == 0 or not B.any(), count)


def by_factors(kind: type[Adapter]) -> bool:
    """Whether the update of this variant is ``scaling * B A``, or is that wherever it acts (aLoRA)."""
    plain = kind.delta_weight in (LoRALinear.delta_weight, LoRAEmbedding.delta_weight)
    return plain or (kind.depends_on_input and issubclass(kind, LoRALinear))

"""The same factors from an adapter folder alone, where it says them without its base model. Next file: ``export/base.py``."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from minilora.errors import CheckpointError, StateError
from minilora.export.factors import GGUF, HOLDS, Factor, name_of, refuse_nonfinite, taken_by
from minilora.lora.adapter import variant
from minilora.lora.variants.experts import from_file
from minilora.store.adapter_files import PREFIX, Stored, refuse_regexes
from minilora.store.contents import by_factors, parameters_in

__all__ = ["NeedsBase", "stored_factors"]

_LINEAR = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"}
_TABLE = {"lora_embedding_A": "A", "lora_embedding_B": "B"}


class NeedsBase(StateError):
    """The folder alone does not say it; with the base model it can be exported."""


def stored_factors(stored: Stored, target: str) -> dict[str, Factor]:
    """Scaled factors by path of their modules; of experts by that of their projection.

    A GGUF LoRA is laid beside a file that is at hand, which says what is a table, a head, or experts; for other programs the base does.

    Raises:
        NeedsBase: what they mean depends on the base model. StateError: what the program cannot hold. CheckpointError: a damaged file.
    """
    if not _says_all(stored, target):
        raise NeedsBase(f"{stored.path}: a {stored.variant} adapter depends on its base model; give it with --model")
    refuse_regexes(stored)
    experts = parameters_in(stored)
    _refuse_parameters(stored, experts, target)
    parts: dict[str, dict[str, Tensor]] = {}
    tables = set()
    for key, tensor in stored.tensors.items():
        if target == GGUF and key.endswith(".base_layer.weight"):  # the frozen table itself: the served file has it
            continue
        path, half = _split(stored, key, tensor, target, experts)
        parts.setdefault(path, {})[half] = tensor.float()
        if "lora_embedding_" in key:
            tables.add(path)
    found = {}
    for path, pair in parts.items():
        found[experts.get(path, path)] = _factor(stored, path, pair, path in tables, path in experts)
    refuse_nonfinite(found)
    return found


def _says_all(stored: Stored, target: str) -> bool:
    if stored.variant == "dora":
        return "DoRA" in HOLDS[target]
    if target != GGUF:
        return stored.variant == "lora"
    kind = variant(stored.variant)
    return by_factors(kind) and not kind.depends_on_input


def _refuse_parameters(stored: Stored, experts: Mapping[str, str], target: str) -> None:
    """Raise for experts that the program has no place for, and for routers."""
    if routers := [entry for entry in stored.config.target_parameters or () if entry.endswith("weight")]:
        raise StateError(f"{stored.path}: {routers[0]} is no weight that other programs adapt; merge instead")
    if not experts or target == GGUF:
        return
    path = next(iter(experts.values()))
    if "experts" in HOLDS[target]:
        raise NeedsBase(
            f"{stored.path}: {path} is a projection of experts, which each architecture names anew; give its base with --model"
        )
    raise StateError(
        f"{stored.path}: {path} is a projection of experts, and other programs differ in how they read those; merge instead"
    )


def _split(stored: Stored, key: str, tensor: Tensor, target: str, experts: Mapping[str, str]) -> tuple[str, str]:
    """Path of the layer in the file, and A, B or m."""
    name = key.removeprefix(PREFIX)
    if target != GGUF and "embeddings" in HOLDS[target]:
        if "lora_embedding_" in key:
            raise NeedsBase(
                f"{stored.path}: {key} is of an embedding, which a head may share; give the base with --model"
            )
        if name.endswith(".base_layer.weight"):
            raise NeedsBase(
                f"{stored.path}: {key} is the base's own table, which an export is not for; give the base with --model"
            )
    for ending, half in (_LINEAR | _TABLE if target == GGUF else _LINEAR).items():
        path = name.removesuffix(f".{ending}")
        known = path != name and (path in experts or ".base_layer." not in key)
        if known and (half == "m" or tensor.dim() == 2 or (tensor.dim() > 2 and "convolutions" in HOLDS[target])):
            return path, half
    raise StateError(
        f"{stored.path}: {key} is no factor that {name_of(target)} holds, which takes {taken_by(target)}; merge instead"
    )


def _factor(stored: Stored, path: str, pair: Mapping[str, Tensor], table: bool, experts: bool) -> Factor:
    if not {"A", "B"} <= pair.keys():
        raise StateError(f"{stored.path}: {path} has only one of lora_A and lora_B; save the adapter again")
    A, B, scaling = pair["A"], pair["B"], stored.config.scaling(path)
    wanted, found = stored.config.for_module(path)[0], len(A)
    if experts and wanted and found % wanted == 0 and B.shape[1] == found:
        count = found // wanted
        return Factor(from_file("lora_A", A, count), scaling * from_file("lora_B", B, count), "experts")
    if wanted != found:
        raise CheckpointError(f"{stored.path}: {path} has rank {found}, the config says {wanted}; save it again")
    if B.shape[1] != found:
        raise StateError(
            f"{stored.path}: {path} is a convolution with groups, which other programs read otherwise; merge instead"
        )
    if table:  # in the file its factors are those of the transpose
        return Factor(B.T, scaling * A.T, "embedding")
    kernel = tuple(A.shape[2:])
    return Factor(A.flatten(1), scaling * B.flatten(1), "convolution" if kernel else "linear", kernel, pair.get("m"))

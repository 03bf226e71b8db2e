"""The same factors from an adapter folder alone, where it says them without its base model. Next file: ``export/base.py``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minilora.errors import CheckpointError, StateError
from minilora.export.factors import GGUF, HOLDS, Factor, name_of, nonfinite, taken_by
from minilora.lora.adapter import variant
from minilora.lora.variants.experts import from_file
from minilora.store.adapter_files import PREFIX, Stored, refuse_regexes
from minilora.store.contents import by_factors, parameters_in

__all__ = ["NeedsBase", "never", "stored_factors", "way_out"]

_LINEAR = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"}
_TABLE = {"lora_embedding_A": "A", "lora_embedding_B": "B"}


class NeedsBase(StateError):
    """The folder alone does not say it; with the base model it can be exported."""


def stored_factors(stored: Stored, target: str, by_shapes: bool = False) -> dict[str, Factor]:
    """Scaled factors by path of their modules; of experts by that of their projection.

    A GGUF LoRA is laid beside a file that is at hand, which says what is a table, a head, or experts; for other programs the base does.
    ``by_shapes``: the factors are on "meta", and no tensor is copied; what is refused is the same.

    Raises:
        NeedsBase: what they mean depends on the base model. StateError: what the program cannot hold. CheckpointError: a damaged file.
    """
    if not _says_all(stored, target):
        if why := never(stored, target):
            raise StateError(f"{stored.path}: {why}, and {name_of(target)} holds no such adapter; {way_out(stored)}")
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
        parts.setdefault(path, {})[half] = tensor
        if "lora_embedding_" in key:
            tables.add(path)
    found = {}
    for path, pair in parts.items():
        name, table = experts.get(path, path), path in tables
        _refuse_overflow(name, stored.config.scaling(path), pair, "A" if table else "B")
        own = {half: (tensor.to("meta") if by_shapes else tensor).float() for half, tensor in pair.items()}
        found[name] = _factor(stored, path, own, table, path in experts)
    return found


def _refuse_overflow(path: str, scaling: float, pair: Mapping[str, Tensor], scaled: str) -> None:
    """Raise for factors that are not finite once they are scaled in fp32, told by the largest numbers in the file."""
    for half, tensor in pair.items():
        ends = torch.stack(torch.aminmax(tensor)).float() if tensor.numel() else torch.zeros(2)
        if not torch.isfinite(ends * scaling if half == scaled else ends).all():
            raise nonfinite(path)


def _says_all(stored: Stored, target: str) -> bool:
    """Whether the update is ``scaling * B A`` of the file, which goes for more variants than plain LoRA (LoRA-FA, an orthogonal start)."""
    if stored.variant == "dora":
        return "DoRA" in HOLDS[target]
    kind = variant(stored.variant)
    return by_factors(kind) and not kind.depends_on_input and (target == GGUF or not kind.replaces_base)


def never(stored: Stored, target: str) -> str:
    """Why no base model helps: an update that is no product of two factors, which the program does not hold; "" where it is one."""
    if stored.variant == "dora" and "DoRA" not in HOLDS[target]:
        return "DoRA rescales every row of a weight, so its update has full rank"
    if variant(stored.variant).depends_on_input:
        return "an activated adapter changes some tokens and not others"
    return ""


def way_out(stored: Stored) -> str:
    """What else can be done with an adapter that a program does not hold."""
    if variant(stored.variant).depends_on_input:
        return "run it in minilora or PEFT, for no merged model has its update"
    return "minilora merge makes a whole model of it"


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

"""What a GGUF LoRA is made of: the updates of an adapter, those of embeddings and experts too, each with its true scale in B.

Other programs take less (``export/factors.py``): llama.cpp alone looks rows of a table up and routes tokens through experts with a LoRA
on them. Next file: ``export/llama_cpp.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from minilora.errors import CheckpointError, StateError
from minilora.gguf.lora import Update
from minilora.lora.adapter import Adapter, variant
from minilora.lora.variants.attention import LoRAOutProj
from minilora.lora.variants.embedding import TiedHead
from minilora.lora.variants.experts import from_file
from minilora.store.adapter_files import PREFIX, Stored, refuse_regexes
from minilora.store.contents import by_factors, parameters_in

__all__ = ["needs_base", "stored_updates", "updates_of"]

_PROGRAM = "llama.cpp"
_KINDS = ("linear", "embedding", "experts")
_HALVES = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_embedding_A": "A", "lora_embedding_B": "B"}


def updates_of(adapters: Mapping[str, object]) -> list[Update]:
    """Of the adapters of a model, by path.

    Raises:
        StateError: one that is no low-rank update: of full rank, of a bias, a copy of a module, of another kind of layer.
    """
    found = []
    for path, value in adapters.items():
        if not isinstance(value, Adapter):
            raise StateError(f"{path}: {_PROGRAM} cannot hold a trained copy or bias; merge the adapter instead")
        if isinstance(value, LoRAOutProj) or value.on not in _KINDS:
            raise StateError(
                f"{path}: {_PROGRAM} takes adapters of linear layers, embeddings and experts; merge instead"
            )
        try:
            A, B = value.as_lora()
        except StateError as error:
            raise StateError(f"{path}: {error}") from None
        kind = "linear" if isinstance(value, TiedHead) else value.on
        found.append(Update(path, A, B, kind))
    return found


def needs_base(stored: Stored) -> bool:
    """Whether the update hangs on the weights that it is made for, so that the folder alone does not say it."""
    return stored.variant != "lora" and (
        variant(stored.variant).depends_on_input or not by_factors(variant(stored.variant))
    )


def stored_updates(stored: Stored) -> list[Update]:
    """Of an adapter folder alone.

    Raises:
        StateError: a variant that needs its base model, or something in the file that is no low-rank update. CheckpointError: the file
            and its config disagree.
    """
    if needs_base(stored):
        raise StateError(f"{stored.path}: a {stored.variant} adapter depends on its base model; give it with --model")
    refuse_regexes(stored)
    experts = parameters_in(stored)
    parts: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, str] = {}
    for key, tensor in stored.tensors.items():
        if key.endswith(
            ".base_layer.weight"
        ):  # the frozen table itself, which PEFT puts beside its factors: the served file has it
            continue
        path, half = _split(stored, key, tensor, experts)
        kinds[path] = "experts" if path in experts else "embedding" if "lora_embedding" in key else "linear"
        parts.setdefault(path, {})[half] = tensor.float()
    return [_update(stored, path, parts[path], kinds[path], experts.get(path, path)) for path in parts]


def _split(stored: Stored, key: str, tensor: Tensor, experts: Mapping[str, str]) -> tuple[str, str]:
    """Path of the layer in the file, and A or B."""
    name = key.removeprefix(PREFIX)
    for ending, half in _HALVES.items():
        path = name.removesuffix(f".{ending}")
        if path != name and tensor.dim() == 2 and (path in experts or ".base_layer" not in path):
            return path, half
    raise StateError(
        f"{stored.path}: {key} is no part of a low-rank update, and {_PROGRAM} cannot hold it; merge instead"
    )


def _update(stored: Stored, path: str, pair: Mapping[str, Tensor], kind: str, place: str) -> Update:
    if len(pair) < 2:
        raise StateError(f"{stored.path}: {path} has only one of lora_A and lora_B; save the adapter again")
    if any(
        entry.endswith("weight") and f"{place}.weight".endswith(entry)
        for entry in stored.config.target_parameters or ()
    ):
        raise StateError(f"{stored.path}: {place} is no weight that {_PROGRAM} adapts; merge instead")
    A, B = pair["A"], pair["B"]
    wanted, found = stored.config.for_module(path)[0], len(A)
    if kind == "experts" and wanted and found % wanted == 0 and B.shape[1] == found:
        A, B = from_file("lora_A", A, found // wanted), from_file("lora_B", B, found // wanted)
    elif wanted != found or B.shape[1] != found:
        raise CheckpointError(f"{stored.path}: {path} has rank {found}, the config says {wanted}; save it again")
    B = stored.config.scaling(path) * B
    return Update(place, B.T, A.T, kind) if kind == "embedding" else Update(place, A, B, kind)

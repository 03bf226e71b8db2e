"""What every program is given of an adapter: the two factors of each layer, with the layer's true scale folded into B.

Next file: ``export/plain_peft.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from minilora.errors import CheckpointError, StateError
from minilora.lora.adapter import Adapter
from minilora.lora.variants.attention import LoRAOutProj
from minilora.lora.variants.embedding import TiedHead
from minilora.store.adapter_files import PREFIX, Stored, refuse_regexes
from minilora.store.contents import parameters_in

__all__ = ["Factors", "factors_of", "stored_factors"]

Factors = Mapping[str, tuple[Tensor, Tensor]]


def factors_of(path: str, value: object, target: str) -> tuple[Tensor, Tensor]:
    if isinstance(value, (LoRAOutProj, TiedHead)) or (isinstance(value, Adapter) and value.on != "linear"):
        raise StateError(
            f"{path}: {target} takes adapters of linear layers only; merge this one into the model instead"
        )
    if not isinstance(value, Adapter):
        raise StateError(
            f"{path}: {target} cannot hold a trained copy or bias; merge the adapter into the model instead"
        )
    try:
        return value.as_lora()
    except StateError as error:
        raise StateError(f"{path}: {error}") from None


def stored_factors(stored: Stored) -> dict[str, tuple[Tensor, Tensor]]:
    """Scaled factors from the file alone."""
    if stored.variant != "lora":
        raise StateError(f"{stored.path}: a {stored.variant} adapter depends on its base model; give it with --model")
    refuse_regexes(stored)
    for path in parameters_in(stored).values():
        raise StateError(
            f"{stored.path}: {path} is a projection of experts, and other programs differ in how they read those; merge instead"
        )
    if routers := [entry for entry in stored.config.target_parameters or () if entry.endswith("weight")]:
        raise StateError(f"{stored.path}: {routers[0]} is no weight that other programs adapt; merge instead")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.tensors.items():
        path, _, name = key.removeprefix(PREFIX).rpartition(".lora_")
        if name not in ("A.weight", "B.weight") or tensor.dim() != 2 or ".base_layer." in key:
            raise StateError(
                f"{stored.path}: {key} is no factor of a linear layer, and other programs cannot hold it; merge instead"
            )
        parts.setdefault(path, {})[name] = tensor.float()
    for path, pair in parts.items():
        if len(pair) < 2:
            raise StateError(f"{stored.path}: {path} has only one of lora_A and lora_B; save the adapter again")
        wanted, found = stored.config.for_module(path)[0], len(pair["A.weight"])
        if wanted != found:
            raise CheckpointError(f"{stored.path}: {path} has rank {found}, the config says {wanted}; save it again")
    return {path: (pair["A.weight"], stored.config.scaling(path) * pair["B.weight"]) for path, pair in parts.items()}

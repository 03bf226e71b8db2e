"""Any adapter whose update does not depend on the input, as a plain LoRA: the best one of a rank, or of the energy that is wanted."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, KindError, StateError, warn
from minilora.files import validate
from minilora.files.parse import tensor_bytes
from minilora.files.write import write_files
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.config import LoraConfig
from minilora.lora.slots import adapters_of, has_adapters
from minilora.lora.targets import exactly
from minilora.store.adapter_files import CONFIG_FILE, PREFIX, WEIGHTS_FILE, seal
from minilora.store.save import base_of, tensors_of

__all__ = ["convert_to_lora", "save_as_lora", "supports_lora_conversion"]

_ROUNDING = 1e-10  # of the sum of squares: what fp32 leaves of singular values that are zero


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """An adapter as a plain LoRA of scaling 1: its config, and its tensors under the names that a file has. The model stays as it is.

    Args:
        rank: a whole number is the rank of every layer; a float in (0, 1] takes for each layer the smallest rank whose singular values
            have that share of the sum of squares (the ranks are then in ``rank_pattern``).
        progressbar: print the layers as they are done.
        compile_kwargs: compile the factorizing with these arguments of ``torch.compile``.

    Raises:
        KindError: no adapter, or one with an update that cannot be a low-rank product. ConfigError: a rank that cannot be meant.
        StateError: an unknown name, or an adapter that trains biases or token rows.
    """
    if not has_adapters(model):
        raise KindError("Could not detect any layer that supports LoRA conversion; inject an adapter first")
    _check_rank(rank)
    record = adapters_of(model)
    held = record.named(adapter_name)
    layers = {path: value for path, value in held.items() if isinstance(value, Adapter) and value.targeted}
    if odd := {type(value).__name__ for value in layers.values() if not _converts(value)}:
        raise KindError(
            f"Some module types on this model do not support LoRA conversion: {', '.join(sorted(odd))}; merge it"
        )
    others = {path: value for path, value in held.items() if path not in layers}
    if more := [path for path, value in others.items() if isinstance(value, (nn.Parameter, Adapter))]:
        raise StateError(f"adapter {adapter_name!r} trains {more[0]} too, which no plain LoRA can; merge it instead")
    if record.variants[adapter_name] == "lora":
        warn("Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.")
    factorize = _factors if compile_kwargs is None else torch.compile(_factors, **compile_kwargs)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for at, (path, layer) in enumerate(layers.items()):
        if progressbar:
            print(f"Converting to LoRA: {path} ({at + 1} of {len(layers)})")
        A, B = _shortened(path, *factorize(layer.delta_weight()), rank)
        found[path] = (B.T.contiguous(), A.T.contiguous()) if _is_table(layer) else (A, B)
    tensors = tensors_of(others)
    for path, (A, B) in found.items():
        names = (
            ("lora_embedding_A", "lora_embedding_B") if _is_table(layers[path]) else ("lora_A.weight", "lora_B.weight")
        )
        tensors |= {f"{PREFIX}{path}.{names[0]}": A, f"{PREFIX}{path}.{names[1]}": B}
    ranks = {path: len(A) for path, (A, _) in found.items()} if isinstance(rank, float) else {}
    paths = [path for path, _ in Bare(model).named_modules() if path]
    own = record.configs[adapter_name]
    config = LoraConfig(
        r=1 if isinstance(rank, float) else rank,
        lora_alpha=1 if isinstance(rank, float) else rank,
        target_modules=exactly(tuple(found), paths),
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        modules_to_save=own.modules_to_save,
        task_type=own.task_type,
        base_model_name_or_path=own.base_model_name_or_path,
    )
    return config, tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Write what ``convert_to_lora`` makes as an adapter folder. Arguments and errors as there, ``CheckpointError`` for the folder."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    files = {
        WEIGHTS_FILE: tensor_bytes({key: t.cpu().contiguous() for key, t in tensors.items()}, {"format": "pt"}),
        CONFIG_FILE: f"{json.dumps(config.to_dict(), indent=2)}\n".encode(),
    }
    write_files(path, seal(files, base_of(model, adapter_name)))


def supports_lora_conversion(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether every layer of the adapter has an update that a low-rank product can come near."""
    layers = [value for value in adapters_of(model).named(adapter_name).values() if isinstance(value, Adapter)]
    return bool(layers) and all(map(_converts, layers))


def _converts(layer: Adapter) -> bool:
    try:
        return layer.delta_weight().dim() == 2 and layer.delta_bias() is None
    except StateError:  # it depends on the input
        return False


def _is_table(layer: Adapter) -> bool:
    return isinstance(layer.innermost, nn.Embedding)


def _check_rank(rank: int | float) -> None:
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ConfigError(
            f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}. 0.9 is usual"
        )
    if not isinstance(rank, float):
        if rank == 0 and not isinstance(rank, bool):
            raise ConfigError("Passing a rank of 0 doesn't make sense; pass 8, for example")
        validate.whole("rank", rank, 1)


def _factors(update: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(update.float(), full_matrices=False)


def _shortened(path: str, U: Tensor, S: Tensor, Vh: Tensor, rank: int | float) -> tuple[Tensor, Tensor]:
    """``(A [r, in], B [out, r])`` from the first singular directions."""
    r = _enough(S, rank) if isinstance(rank, float) else rank
    if r > len(S):
        raise ConfigError(
            f"The chosen rank {r} is larger than the weight shape ({len(S)}), please choose a lower rank ({path})"
        )
    return Vh[:r].contiguous(), (U[:, :r] * S[:r]).contiguous()


def _enough(S: Tensor, share: float) -> int:
    """How many singular values have this share of the sum of all squares, but for rounding; 1 at least."""
    energy = S.double().square().cumsum(0)
    return min(int(torch.searchsorted(energy, share * energy[-1] * (1 - _ROUNDING))) + 1, len(S))

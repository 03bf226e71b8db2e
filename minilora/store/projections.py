"""VeRA's two shared matrices in a file, ``base_model.vera_A`` and ``base_model.vera_B``, as PEFT has them. Next: ``store/load.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from minilora.errors import CheckpointError
from minilora.lora.slot import Value
from minilora.lora.variants.vera import Projections, VeRALinear
from minilora.lora.vera_config import VeraConfig
from minilora.store.adapter_files import PROJECTIONS, Stored

__all__ = ["projections_in", "same_projections", "with_projections"]


def projections_in(values: Mapping[str, Value]) -> dict[str, Tensor]:
    """The shared matrices of an adapter that its file holds; none for another variant."""
    layers = _layers(values)
    held = layers[0].projections if layers else None
    if held is None or not held.saved:
        return {}
    return dict(zip(PROJECTIONS, (held.A, held.B), strict=True))


def with_projections(values: Mapping[str, Value], stored: Stored) -> Stored:
    """Put a file's matrices into a new adapter's layers; returns the file without them.

    Raises:
        CheckpointError: the config says that they are there, and they are not; a shape that cannot serve these layers; or matrices that
            the config does not speak of and its key does not give.
    """
    pair, left = _split(stored)
    config = stored.config
    if not isinstance(config, VeraConfig):
        return stored
    layers = _layers(values)
    if pair is None:
        if config.save_projection:
            raise CheckpointError(
                f"{stored.path}: save_projection is true, and {PROJECTIONS[0]} or {PROJECTIONS[1]} is missing; save the adapter again, or "
                "set save_projection to false in its config, and they are drawn from the key"
            )
        return left
    A, B = (tensor.float() for tensor in pair)
    for name, tensor, axis, most in (
        (PROJECTIONS[0], A, 1, max(layer.in_features for layer in layers)),
        (PROJECTIONS[1], B, 0, max(layer.out_features for layer in layers)),
    ):
        if tensor.dim() != 2 or tensor.shape[axis] < most or tensor.shape[1 - axis] != config.r:
            wanted = f"[{config.r}, {most} or more]" if axis else f"[{most} or more, {config.r}]"
            raise CheckpointError(
                f"{stored.path}: {name} is {list(tensor.shape)}, config and model want {wanted}; wrong base model or r"
            )
    if not config.save_projection and not all(
        torch.equal(layer.shared_A.cpu(), A[:, : layer.in_features])
        and torch.equal(layer.shared_B.cpu(), B[: layer.out_features])
        for layer in layers
    ):
        raise CheckpointError(
            f"{stored.path}: save_projection is false, and {PROJECTIONS[0]} stands in the file and is not what the key gives; set "
            "save_projection to true in its config if the file is right"
        )
    shared = Projections(A, B, config.save_projection)
    for layer in layers:
        layer.take(shared)
    return left


def same_projections(values: Mapping[str, Value], stored: Stored) -> Stored:
    """A file without the matrices that an adapter has already. Raises ``CheckpointError`` if the adapter stands on others."""
    pair, left = _split(stored)
    layers = _layers(values)
    if not layers:
        return stored
    held = layers[0].projections
    other = (held is None) != (not isinstance(stored.config, VeraConfig))
    if pair is not None and held is not None:
        # A file may have been made of more layers than these, and its matrices may be larger.
        other = not all(
            torch.equal(layer.shared_A.cpu().float(), pair[0][:, : layer.in_features].float())
            and torch.equal(layer.shared_B.cpu().float(), pair[1][: layer.out_features].float())
            for layer in layers
        )
    if other:
        raise CheckpointError(
            f"{stored.path}: its vectors belong to other random matrices than this adapter's; load it under a name of its own"
        )
    return left


def _layers(values: Mapping[str, Value]) -> list[VeRALinear]:
    return [value for value in values.values() if isinstance(value, VeRALinear)]


def _split(stored: Stored) -> tuple[list[Tensor] | None, Stored]:
    found = [stored.tensors[name] for name in PROJECTIONS if name in stored.tensors]
    rest = {key: tensor for key, tensor in stored.tensors.items() if key not in PROJECTIONS}
    return found if len(found) == len(PROJECTIONS) else None, dataclasses.replace(stored, tensors=rest)

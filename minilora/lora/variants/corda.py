"""CorDA (Yang et al. 2024, arXiv 2406.05223, section 3): start from the part of the weight that some data needs most, or least.

With the covariance ``C = sum x x^T`` of a layer's inputs, ``W C = U S V^T`` orders the directions of W by what the data makes of them, and
``W = U S (V^T C^-1)``. "ipm" starts from the first r terms, which the task needs; "kpm" from the last r, which what is known needs least.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError, StateError
from minilora.files.parse import parse_tensors, tensor_bytes
from minilora.files.read import read_bytes
from minilora.files.write import write_file
from minilora.linear.layers import dense_weight, is_linear
from minilora.lora.adapter import register
from minilora.lora.bare import Bare
from minilora.lora.change import Change
from minilora.lora.config import LoraConfig
from minilora.lora.match import match
from minilora.lora.starts import CordaConfig
from minilora.lora.variants.residual import DataStartLoRA

__all__ = ["CordaEigens", "CordaLinear", "preprocess_corda"]

_WORST_INVERSE = 0.05  # |C C^-1 - I| at most; else the diagonal is raised


@dataclass
class CordaEigens:
    """The r terms that a layer starts from, fp32: ``S_WC [r]``, ``U_WC [out, r]``, ``V_WC [in, r]`` with the inverse covariance in it."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


@register("corda")
class CordaLinear(DataStartLoRA):
    """``A = sqrt(S / s) V^T``, ``B = U sqrt(S / s)`` of the terms that ``preprocess_corda`` left at the base layer."""

    data_name: ClassVar[str] = "eigens"
    without_data: ClassVar[str] = (
        "`eigens` attribute not found for layer, please run `preprocess_corda` first (minilora.lora.variants.corda)"
    )

    def part_of(self, weight: Tensor, config: LoraConfig) -> tuple[Tensor, Tensor]:
        found: Any = self.innermost.eigens
        shapes = [tuple(each.shape) for each in (found.S_WC, found.U_WC, found.V_WC)]
        if shapes != [(self.r,), (self.out_features, self.r), (self.in_features, self.r)]:
            raise ConfigError(
                f"CorDA: S, U and V of {shapes} for r={self.r} and a weight of {tuple(weight.shape)}; run preprocess_corda with "
                "this model and config"
            )
        root = (found.S_WC.to(weight) / self.scaling).sqrt()
        return root[:, None] * found.V_WC.to(weight).T, found.U_WC.to(weight) * root


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Leave at every linear layer that ``lora_config`` targets what CorDA starts from, as ``layer.eigens``; injecting takes it away.

    Args:
        lora_config: with ``corda_config``. Its files are safetensors; those that are there are read and nothing is computed.
        run_model: runs the model on the data, batch by batch; not needed where a file is there.
        hooked_model: the model that ``run_model`` runs, if it is a copy of ``model``.

    Raises:
        ConfigError: no ``corda_config``. StateError: no way to the covariances, or a layer that saw no finite input.
        CheckpointError: a file that has not these layers.
    """
    settings = lora_config.corda_config
    if settings is None:
        raise ConfigError(
            "corda_config is None; give LoraConfig(init_lora_weights='corda', corda_config=CordaConfig())"
        )
    layers = _layers(model, lora_config)
    if (known := _read(settings.cache_file)) is not None:
        for path, layer in layers.items():
            parts = [_entry(known, f"{path}.eigens.{name}", settings.cache_file) for name in ("S_WC", "U_WC", "V_WC")]
            layer.eigens = CordaEigens(*(part.to(dense_weight(layer).device) for part in parts))  # type: ignore[assignment]
        return
    covariances, counts = _covariances(layers, lora_config, settings, run_model, hooked_model or model)
    found: dict[str, CordaEigens] = {}
    for at, (path, layer) in enumerate(layers.items()):
        if settings.verbose:
            print(f"CorDA: {path} ({at + 1} of {len(layers)})")
        r = lora_config.for_module(path)[0]
        found[path] = _terms(path, dense_weight(layer).float(), covariances[path].float(), r, settings.corda_method)
    for path, layer in layers.items():
        layer.eigens = found[path]  # type: ignore[assignment]
        if not settings.prune_temporary_fields:
            layer.covariance_matrix, layer.sample_count = covariances[path], counts.get(path, 0)  # type: ignore[assignment]
    _write(settings.cache_file, {f"{path}.eigens.{k}": v for path, e in found.items() for k, v in vars(e).items()})


def _layers(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    bare = Bare(model)
    layers = {path: bare.get_submodule(path) for path in match(model, config).targets}
    return {path: layer for path, layer in layers.items() if is_linear(layer)}


def _covariances(
    layers: Mapping[str, nn.Module],
    config: LoraConfig,
    settings: CordaConfig,
    run_model: Callable[[], object] | None,
    hooked: nn.Module,
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """By path ``sum x x^T / calls``, ``[in, in]``, of inputs divided by their largest value in a call; and the calls."""
    if (known := _read(settings.covariance_file)) is not None:
        return {
            path: _entry(known, path, settings.covariance_file).to(dense_weight(layers[path]).device) for path in layers
        }, {}
    if run_model is None:
        raise StateError(
            "run_model must be specified when covariance file and cache file aren't built; it runs the data"
        )
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def listen(path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: object) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            x = x if settings.use_float16_for_covariance else x.float()
            x = x / x.max().abs()
            square = x.T @ x
            if not square.isfinite().all():
                raise StateError(f"CorDA: {path} got NaN or infinity, or zeros only; look at the data of this batch")
            sums[path] = sums[path] + square if path in sums else square
            counts[path] = counts.get(path, 0) + 1

        return hook

    change = Change()
    try:
        change.train(hooked, False)
        for path, layer in _layers(hooked, config).items():
            change.item(layer._forward_hooks, "minilora.corda", listen(path))  # type: ignore[arg-type]
        run_model()
    finally:
        change.take_back()
    if silent := [path for path in layers if path not in sums]:
        raise StateError(f"CorDA: {silent[0]} saw no input; let run_model run the model on the data")
    means = {path: sums[path] / counts[path] for path in layers}
    _write(settings.covariance_file, means)
    return means, counts


def _terms(path: str, weight: Tensor, covariance: Tensor, r: int, method: str) -> CordaEigens:
    """The first or last r terms of ``W C``; the diagonal of C is raised until C has an inverse."""
    if r > min(weight.shape):
        raise ConfigError(
            f"CorDA: r={r} for {path}, a weight of {tuple(weight.shape)}; set r={min(weight.shape)} or less"
        )
    one, damp = torch.eye(len(covariance), device=covariance.device), 0.01
    while True:
        raised = covariance + one * covariance.diagonal().mean() * damp
        inverse = torch.linalg.inv(raised)
        if torch.dist(raised @ inverse, one) < _WORST_INVERSE:
            break
        damp *= 2
    U, S, Vh = torch.linalg.svd(weight @ raised, full_matrices=False)
    V = (Vh @ inverse).T
    part = slice(0, r) if method == "ipm" else slice(len(S) - r, len(S))
    return CordaEigens(S[part].clone(), U[:, part].clone(), V[:, part].clone())


def _read(file: str | os.PathLike[str] | None) -> dict[str, Tensor] | None:
    if file is None or not os.path.isfile(file) or not os.path.getsize(file):
        return None
    return parse_tensors(read_bytes(file, "CorDA's cache"), file)[0]


def _entry(known: Mapping[str, Tensor], name: str, file: object) -> Tensor:
    if name not in known:
        raise CheckpointError(f"{file}: has no {name}; it was made with another model or config, delete it")
    return known[name]


def _write(file: str | os.PathLike[str] | None, tensors: Mapping[str, Tensor]) -> None:
    if file is not None:
        write_file(Path(file), tensor_bytes(tensors, {"format": "pt"}))

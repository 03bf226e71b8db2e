"""LoRA-GA (Wang et al. 2024, arXiv 2407.05000, section 3): start so that the first step is close to that of the whole weight.

``G = U S V^T`` is the gradient of the weight on some data; A takes r rows of ``V^T`` and B r columns of ``U S``, others than A or the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError, StateError, TargetError
from minilora.files.parse import parse_tensors, tensor_bytes
from minilora.files.read import read_bytes
from minilora.files.write import write_file
from minilora.linear.layers import is_linear, is_quantized
from minilora.linear.packed import is_conv1d
from minilora.lora.adapter import register
from minilora.lora.bare import Bare
from minilora.lora.change import Change
from minilora.lora.config import LoraConfig
from minilora.lora.match import match
from minilora.lora.starts import LoraGAConfig
from minilora.lora.variants.residual import DataStartLoRA

__all__ = ["LoraGALinear", "preprocess_loraga"]

_GRADIENT = "_peft_loraga_grad"  # PEFT's name, which its documentation gives


@register("lora_ga")
class LoraGALinear(DataStartLoRA):
    """LoRA from the singular directions of the gradient that ``preprocess_loraga`` left at the base layer."""

    data_name: ClassVar[str] = _GRADIENT
    without_data: ClassVar[str] = (
        "LoRA-GA starts from a gradient, and there is none; run preprocess_loraga first (minilora.lora.variants.lora_ga)"
    )

    def part_of(self, weight: Tensor, config: LoraConfig) -> tuple[Tensor, Tensor]:
        settings = config.lora_ga_config
        if settings is None:
            raise ConfigError("lora_ga_config must be provided when init_lora_weights='lora_ga'; pass LoraGAConfig()")
        r, gradient = self.r, getattr(self.innermost, _GRADIENT).to(weight)
        gradient = gradient.T if is_conv1d(self.innermost) else gradient
        if 2 * r > min(gradient.shape):
            raise ConfigError(
                f"LoRA-GA takes 2 r directions, and r={r} for a weight of {tuple(weight.shape)}; set r={min(weight.shape) // 2}"
            )
        U, S, V = torch.svd_lowrank(gradient, q=min(4 * r, *gradient.shape), niter=4)
        of_A, of_B = _directions(settings.direction, r)
        A, B = V.T[of_A], U[:, of_B] * S[of_B]
        return self._scaled(A, B, S[of_B], weight, settings)

    def _scaled(self, A: Tensor, B: Tensor, S: Tensor, weight: Tensor, settings: LoraGAConfig) -> tuple[Tensor, Tensor]:
        if settings.scale == "stable":
            B = B * (self.out_features**0.25 / settings.stable_gamma**0.5)
        elif settings.scale == "weight_svd":
            largest = torch.svd_lowrank(weight, q=self.r, niter=4)[1][0]
            B = B * (largest / S[0]) if S[0] > 0 else B
        elif settings.scale == "gd_scale":
            A, B = A / self.scaling, B / self.scaling
        return A, B


def _directions(direction: str, r: int) -> tuple[Tensor, Tensor]:
    """Which of the first 2 r singular directions A and B take."""
    each = torch.arange(2 * r)
    if direction == "ArBr":
        return each[1::2], each[0::2]
    if direction == "A2rBr":
        return each[r:], each[:r]
    if direction == "ArB2r":
        return each[:r], each[r:]
    chosen = torch.randperm(2 * r)[:r]
    return chosen, chosen


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], object],
    cache_file: str | os.PathLike[str] | None = None,
) -> None:
    """Leave at every linear layer that ``lora_config`` targets the mean gradient of its weight, fp32; injecting takes it away.

    Args:
        lora_config: with ``lora_ga_config``.
        train_step: runs forward and backward on some batches; every gradient counts, also one that it sets to zero again.
        cache_file: a safetensors file; if it is there, it is read and nothing is run.

    Raises:
        ConfigError: no ``lora_ga_config``. TargetError: no linear layer, or a quantized one. StateError: a layer without a gradient.
        CheckpointError: a file that has not these layers.
    """
    if lora_config.lora_ga_config is None:
        raise ConfigError(
            "If you want to use LoRA-GA, give LoraConfig init_lora_weights='lora_ga' and lora_ga_config=LoraGAConfig()"
        )
    bare = Bare(model)
    layers = {path: bare.get_submodule(path) for path in match(model, lora_config).targets}
    layers = {path: layer for path, layer in layers.items() if is_linear(layer)}
    if not layers:
        raise TargetError(
            "No supported layers found for LoRA-GA, which wants Linear or Conv1D; name some in target_modules"
        )
    for path, layer in layers.items():
        if is_quantized(layer) or hasattr(layer, "quant_state"):
            raise TargetError(
                f"{path} is quantized, and LoRA-GA wants the gradient of a dense weight; give the dense model"
            )
    if cache_file is not None and os.path.isfile(cache_file) and os.path.getsize(cache_file):
        known = parse_tensors(read_bytes(cache_file, "LoRA-GA's cache"), cache_file)[0]
        for path in layers:
            if f"{path}.{_GRADIENT}" not in known:
                raise CheckpointError(f"{cache_file}: has no gradient of {path}; it is another model's, delete it")
        found = {path: known[f"{path}.{_GRADIENT}"] for path in layers}
    else:
        found = _gradients(model, layers, train_step)
        if cache_file is not None:
            named = {f"{path}.{_GRADIENT}": gradient for path, gradient in found.items()}
            write_file(Path(cache_file), tensor_bytes(named, {"format": "pt"}))
    for path, layer in layers.items():
        setattr(layer, _GRADIENT, found[path].to(layer.weight.device))  # type: ignore[arg-type]


def _gradients(model: nn.Module, layers: dict[str, nn.Module], train_step: Callable[[], object]) -> dict[str, Tensor]:
    """By path the mean gradient in the layer's own orientation. The model trains meanwhile, and nothing of it but these weights."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def listen(path: str) -> Any:
        def add(gradient: Tensor) -> None:
            sums[path] = sums[path] + gradient.float() if path in sums else gradient.float()
            counts[path] = counts.get(path, 0) + 1

        return add

    change, handles = Change(), []
    weights: dict[str, Any] = {path: layer.weight for path, layer in layers.items()}
    try:
        change.train(model, True)
        for parameter in model.parameters():
            change.put(parameter, "requires_grad", False)
            change.put(parameter, "grad", None)
        for path, weight in weights.items():
            change.put(weight, "requires_grad", True)
            handles.append(weight.register_hook(listen(path)))
        with torch.enable_grad():
            train_step()
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights.values():
            weight.grad = None
        change.take_back()
    if silent := [path for path in layers if path not in sums]:
        raise StateError(f"LoRA-GA: {silent[0]} got no gradient; call backward() on a loss of the model in train_step")
    return {path: sums[path] / counts[path] for path in layers}

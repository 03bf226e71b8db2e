"""``peft.utils.loftq_utils``: adapters that make up for the error of a base that is packed already."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, KindError, StateError
from minilora.files.hub import cached
from minilora.files.parse import parse_json
from minilora.files.read import read_bytes
from minilora.linear.layers import dense_weight, is_foreign, is_quantized
from minilora.lora.bare import Bare
from minilora.lora.change import LOCK, Change
from minilora.lora.layer import LoRALinear
from minilora.lora.slots import adapters_of
from minilora.lora.variants.loftq import best_factors
from minilora.peft.hub import name_of
from minilora.store.tensors import CLOSE

__all__ = ["replace_lora_weights_loftq"]


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Give each layer on a packed base (of bitsandbytes, or minilora's own) the A and B that are closest to what packing lost.

    One step of LoftQ (Li et al. 2023, arXiv 2310.08659, equation 9): ``s B A`` is the best rank-r part of ``W - dequantize(pack(W))``. PEFT
    leaves out the scaling ``s``, and so corrects by another amount where ``lora_alpha`` is not ``r``.

    Args:
        model_path: the safetensors of the dense model: a file, or its folder; by default where the model was loaded from.
        callback: is called with the model and the layer's path after each layer; what it answers False to is taken back.

    Raises:
        KindError: no plain LoRA layer on a packed base. StateError: no way to the dense weights. CheckpointError: a weight that is not
            there, of another shape, or not what the layer was packed from. Nothing has changed then.
    """
    layers = {
        path: layer
        for path, layer in adapters_of(peft_model).named(adapter_name).items()
        if type(layer) is LoRALinear and (is_quantized(layer.innermost) or is_foreign(layer.innermost))
    }
    if not layers:
        raise KindError(
            f"No bnb LoRA module found on the model: adapter {adapter_name!r} has no plain LoRA layer on a packed base"
        )
    source = _Dense(_folder(peft_model, model_path), getattr(Bare(peft_model).model, "base_model_prefix", ""))
    for path, layer in layers.items():  # before anything changes
        source.check(path, layer)
    with LOCK, Change() as change:
        for path, layer in layers.items():
            lost = source.weight(path, layer) - dense_weight(layer.innermost).float()
            A, B = best_factors(lost, layer.r, layer.scaling)
            before = layer.lora_A.clone(), layer.lora_B.clone()
            change.overwrite(layer.lora_A, A)
            change.overwrite(layer.lora_B, B)
            if callback is not None and not callback(peft_model, path):
                change.overwrite(layer.lora_A, before[0])
                change.overwrite(layer.lora_B, before[1])


def _folder(model: nn.Module, given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return Path(given)
    name = name_of(model)
    if name is not None and Path(name).is_dir():
        return Path(name)
    found = cached(name, "model.safetensors") or cached(name, "model.safetensors.index.json")
    if found is None:
        raise StateError(
            f"the dense weights of {name or 'this model'} are not on this disk; give model_path, the folder or file of its safetensors"
        )
    return found.parent


class _Dense:
    """The dense weights of a model in one safetensors file or several, read one by one."""

    def __init__(self, path: Path, prefix: str) -> None:
        self.path, self.prefix = path, f"{prefix}." if prefix else ""
        index = path / "model.safetensors.index.json"
        self.files: dict[str, Path] = {}
        if path.is_dir() and index.exists():
            try:
                names = parse_json(read_bytes(index, "the names of the dense weights"))["weight_map"]
                self.files = {name: path / Path(str(file)).name for name, file in names.items()}
            except (ValueError, KeyError, AttributeError) as error:
                raise CheckpointError(f"{index}: no index of safetensors ({error}); save the model again") from None
        else:
            file = path / "model.safetensors" if path.is_dir() else path
            self.files = dict.fromkeys(self._opened(file).keys(), file)

    def _opened(self, file: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(file, framework="pt", device="cpu")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read as safetensors ({error}); give model_path") from None

    def _read(self, path: str, layer: LoRALinear) -> Tensor:
        name = f"{path}.weight"
        own = next(
            (each for each in (name, name.removeprefix(self.prefix), self.prefix + name) if each in self.files), None
        )
        if own is None:
            raise CheckpointError(f"{self.path}: has no {name}; give the model_path of the model that was packed")
        tensor: Tensor = self._opened(self.files[own]).get_tensor(own).float()
        turned = getattr(getattr(layer.innermost, "source_cls", None), "__name__", "") == "Conv1D"
        return tensor.T if turned else tensor

    def check(self, path: str, layer: LoRALinear) -> None:
        """Whether this is the weight that the layer was packed from."""
        tensor, packed = self._read(path, layer), dense_weight(layer.innermost).float()
        if tensor.shape != packed.shape:
            raise CheckpointError(
                f"{self.path}: {path}.weight is {list(tensor.shape)}, the packed layer {list(packed.shape)}; give the model that was packed"
            )
        if not (tensor.to(packed.device) - packed).norm() < CLOSE * packed.norm():
            raise CheckpointError(
                f"{self.path}: {path}.weight is another weight than the one that was packed; give the model_path of that model"
            )

    def weight(self, path: str, layer: LoRALinear) -> Tensor:
        """``[out, in]`` fp32 on the layer's device."""
        return self._read(path, layer).to(layer.lora_A.device)

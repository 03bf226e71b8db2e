"""Packed models on disk: saved as bitsandbytes' 4-bit checkpoints, read without bitsandbytes, weight by weight.

A folder is an ordinary transformers folder whose config says ``quant_method: bitsandbytes``; transformers with bitsandbytes opens it too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, StateError
from minilora.files.parse import parse_tensors
from minilora.files.read import read_bytes
from minilora.hf.folders import in_new_folder, read_config, refuse_occupied, unreadable
from minilora.linear.layers import QuantLinear, is_conv1d, is_linear, is_quantized
from minilora.lora.bases import refuse_nested
from minilora.lora.slots import has_adapters
from minilora.qlora.kbit import dtype_on_disk
from minilora.quant.bnb import from_bitsandbytes, is_state, to_bitsandbytes, weight_of
from minilora.quant.codebooks import codebook
from minilora.quant.config import QuantConfig
from minilora.training.guards import refuse_nonfinite

__all__ = ["is_packed_folder", "load_packed", "packed_state_dict", "save_packed"]


def packed_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with every packed layer under bitsandbytes' names; what is shared is named once."""
    if has_adapters(model):
        raise StateError(
            "the model carries adapters; save them with save_adapter, and the packed base before injecting"
        )
    refuse_nested(model.named_modules())
    packed = {path: module for path, module in model.named_modules() if is_quantized(module)}
    if not packed:
        raise StateError("the model has no packed layer; call quantize_model first")
    tensors: dict[str, Tensor] = {}
    for path, layer in packed.items():
        tensors |= {f"{path}.weight{suffix}": tensor for suffix, tensor in to_bitsandbytes(layer.quantized()).items()}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, own = name.rpartition(".")
        if (owner in packed and own != "bias") or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        kept = dtype_on_disk(model.get_submodule(owner))
        tensors[name] = tensor.detach().to("cpu", kept or tensor.dtype).contiguous()
    return tensors


def dense_linears(model: nn.Module) -> list[str]:
    """Paths of the linear layers that are not packed."""
    return sorted(path for path, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module))


def bitsandbytes_entry(config: QuantConfig, dense: list[str]) -> dict[str, Any]:
    """What bitsandbytes writes into ``config.json``: the format, and the linear layers that stay dense."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": codebook(config.format).name,
        "bnb_4bit_use_double_quant": config.double_quant,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense or None,
    }


def save_packed(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write a packed transformers model into a new or empty folder; a head tied to the embedding is not written twice.

    Raises:
        CheckpointError: the folder holds something, or cannot be written; nothing is left then. StateError: nothing is packed, or
            adapters are in the model, or a tensor holds NaN or infinity. QuantizationError: a format that bitsandbytes does not have.
    """
    in_new_folder(refuse_occupied(folder), lambda staged: write_packed(model, staged))


def write_packed(model: Any, folder: Path) -> None:
    tensors = packed_state_dict(model)
    refuse_nonfinite(tensors.items(), "the packed model")
    layers = [module for module in model.modules() if is_quantized(module)]
    nested = any(layer.double_quant for layer in layers)
    quantization = bitsandbytes_entry(QuantConfig(layers[0].book, layers[0].blocksize, nested), dense_linears(model))
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"quantization_config": quantization, "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def is_packed_folder(folder: str) -> bool:
    """Whether a local folder's config says that bitsandbytes packed it in four bits."""
    file = Path(folder) / "config.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("quant_method") == "bitsandbytes" and bool(said.get("load_in_4bit"))


def load_packed(folder: str, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """A model from such a folder: packed layers as ``QuantLinear``, everything else dense in ``dtype``.

    Raises:
        CheckpointError: a file is missing or damaged, or holds tensors that do not fit the model; each by name.
    """
    try:
        return _loaded(folder, dtype, trust_remote_code)
    except Exception as error:  # of a damaged config anything can come, out of the middle of transformers
        raise unreadable(folder, error) from None


def _loaded(folder: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    import transformers

    config, make = read_config(folder, folder, trust_remote_code), transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model = make(config, dtype=dtype, trust_remote_code=trust_remote_code)
    tensors = _all_tensors(Path(folder))
    for weight, own in _packed_groups(tensors).items():
        _put_packed(model, weight.removesuffix(".weight"), from_bitsandbytes(own, weight), tensors, dtype)
    _put_dense(model, tensors, dtype, folder)
    model.tie_weights()
    _fill_buffers(model)
    return model.eval()


def _packed_groups(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Each packed weight with what belongs to it, by what is appended to its name; taken out of ``tensors``."""
    groups: dict[str, dict[str, Tensor]] = {weight_of(name): {} for name in sorted(tensors) if is_state(name)}
    for name in list(tensors):
        if (weight := weight_of(name)) in groups:
            groups[weight][name.removeprefix(weight)] = tensors.pop(name)
    return groups


def _all_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors file; pickles are not read, save the model again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        found = parse_tensors(read_bytes(file, "the model's weights"), file)[0]
        if twice := found.keys() & tensors.keys():
            raise CheckpointError(f"{file}: {min(twice)[:200]} is in another file of the folder, too; keep one of them")
        tensors |= found
    return tensors


def _put_packed(model: nn.Module, path: str, weight: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    try:
        old: Any = model.get_submodule(path)
    except AttributeError:
        raise CheckpointError(f"{path[:200]}.weight: the model has no such layer; wrong config.json?") from None
    if not is_linear(old):
        raise CheckpointError(
            f"{path}.weight: is packed, and the model has a {type(old).__name__} there; wrong config.json?"
        )
    wanted = tuple(old.weight.shape[::-1] if is_conv1d(old) else old.weight.shape)
    if tuple(weight.shape) != wanted:
        raise CheckpointError(f"{path}.weight: is {list(weight.shape)}, the model wants {list(wanted)}")
    bias = tensors.pop(f"{path}.bias", None)
    held, own = (None if value is None else list(value.shape) for value in (bias, old.bias))
    if held != own:
        raise CheckpointError(f"{path}.bias: is {held}, the model wants {own}; the weights do not fit config.json")
    kind = type(old) if is_conv1d(old) else None
    layer = QuantLinear(weight, None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False), kind)
    model.set_submodule(path, layer)


def _put_dense(model: nn.Module, tensors: dict[str, Tensor], dtype: torch.dtype, folder: str) -> None:
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    packed = {path for path, module in model.named_modules() if is_quantized(module)}
    for name, own in model.state_dict().items():
        if name in cast and cast[name].shape != own.shape:
            shapes = f"is {list(cast[name].shape)}, the model wants {list(own.shape)}"
            raise CheckpointError(f"{folder}: {name} {shapes}; the weights do not fit config.json")
    result = model.load_state_dict(cast, strict=False, assign=True)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [name for name in result.missing_keys if name.rpartition(".")[0] not in packed and name not in tied]
    if missing or result.unexpected_keys:
        what = f"{missing[0]} is missing" if missing else f"{result.unexpected_keys[0]} is unexpected"
        raise CheckpointError(f"{folder}: {what}; the weights do not fit config.json")


def _fill_buffers(model: Any) -> None:
    """Rotary tables and the like are computed, not stored: make again what is still on the meta device."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            config = getattr(module, "config", None) or model.config
            fresh = type(module)(config)
            for name, buffer in fresh._buffers.items():
                module._buffers[name] = buffer
            for name, value in vars(fresh).items():
                if isinstance(value, Tensor):
                    setattr(module, name, value)
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise CheckpointError(f"{left[0]}: is neither in the file nor made by the model")

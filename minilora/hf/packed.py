"""Packed models on disk: saved as bitsandbytes' 4-bit checkpoints where it has the format, read without it, weight by weight.

A folder is an ordinary transformers folder whose config says ``quant_method: bitsandbytes``; transformers with bitsandbytes opens it too.
What bitsandbytes lacks (other codebooks, 2, 3 and 8 bits, blocks of 32) is kept under ``quant_method: minilora``, which minilora opens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError, StateError
from minilora.files.tensors import Tensors, open_tensors
from minilora.gguf.file import gguf_in, has_blocks
from minilora.hf.fill import fill
from minilora.hf.folders import in_new_folder, read_config, refuse_occupied, unreadable
from minilora.hf.older_readers import write_older_keys
from minilora.linear.experts.layers import ExpertsLinear, is_experts
from minilora.linear.layers import is_conv1d, is_ours, is_quantized
from minilora.lora.bare import Bare
from minilora.lora.bases import refuse_nested
from minilora.lora.slots import has_adapters
from minilora.qlora.kbit import dtype_on_disk
from minilora.quant.bnb import is_state, storable, weight_of
from minilora.quant.codebooks import CODEBOOKS, OF_BITSANDBYTES, Codebook, codebook
from minilora.quant.config import QuantConfig
from minilora.quant.on_disk import from_disk, to_disk
from minilora.quant.quantized import QuantizedTensor
from minilora.quant.stack import QuantizedStack
from minilora.training.guards import refuse_nonfinite
from minilora.training.rows import Rows

__all__ = [
    "METHOD",
    "is_packed_folder",
    "load_packed",
    "packed_entry",
    "packed_state_dict",
    "packing_said",
    "save_packed",
]

METHOD = "minilora"  # ``quant_method`` of the own entry


def packed_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state with the parts of every packed layer under its names on disk; what is shared is named once."""
    if has_adapters(model):
        raise StateError(
            "the model carries adapters; save them with save_adapter, and the packed base before injecting"
        )
    refuse_nested(model.named_modules())
    every = {path: module for path, module in model.named_modules() if is_quantized(module)}
    if not every:
        raise StateError("the model has no packed layer; call quantize_model first")
    packed = {path: module for path, module in every.items() if is_ours(module)}
    if other := [path for path in every if path not in packed]:
        raise StateError(
            f"{other[0]}: is packed as {every[other[0]].format}, a format of GGUF, and its folder is its own .gguf file; save the adapter "
            "with save_adapter, or merge into a dense model"
        )
    tensors: dict[str, Tensor] = {}
    for path, layer in packed.items():
        name = weight_name_of(path, layer)
        tensors |= {f"{name}{suffix}": tensor for suffix, tensor in to_disk(layer.quantized()).items()}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, own = name.rpartition(".")
        if (owner in packed and own != "bias") or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        kept = dtype_on_disk(model.get_submodule(owner))
        tensors[name] = tensor.detach().to("cpu", kept or tensor.dtype).contiguous()
    return tensors


def weight_name_of(path: str, layer: nn.Module) -> str:
    """What the weight of a layer is called in the dense model: of experts' projections there is a parameter at the path itself."""
    return path if is_experts(layer) else f"{path}.weight"


def dense_linears(model: nn.Module) -> list[str]:
    """Paths of the linear layers and of the experts' projections that are not packed."""
    modules = Bare(model).named_modules()
    return sorted(path for path, layer in modules if isinstance(layer, (nn.Linear, ExpertsLinear)) or is_conv1d(layer))


def packed_entry(config: QuantConfig, dense: list[str], experts: bool = False) -> dict[str, Any]:
    """The entry of ``config.json``: the format, and the linear layers that stay dense; bitsandbytes' own, if it has the format.

    Args:
        experts: whether experts are packed. transformers reads none, although bitsandbytes can store them: the entry is our own then.
    """
    name = codebook(config.format).name
    if storable(config.format, config.blocksize) and not experts:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": name,
            "bnb_4bit_use_double_quant": config.double_quant,
            "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": dense or None,
        }
    return {
        "quant_method": METHOD,
        "format": name,
        "bits": codebook(config.format).bits,
        "blocksize": config.blocksize,
        "double_quant": config.double_quant,
        "dense_modules": dense or None,
    }


def save_packed(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write a packed transformers model into a new or empty folder; a head tied to the embedding is not written twice.

    Raises:
        CheckpointError: the folder holds something, or cannot be written; nothing is left then. StateError: nothing is packed, or
            adapters are in the model, or a tensor holds NaN or infinity.
    """
    in_new_folder(refuse_occupied(folder), lambda staged: write_packed(model, staged))


def write_packed(model: Any, folder: Path) -> None:
    tensors = packed_state_dict(model)
    refuse_nonfinite(tensors.items(), "the packed model")
    layers = [module for module in model.modules() if is_ours(module)]
    layers.sort(
        key=lambda layer: storable(layer.book, layer.blocksize)
    )  # one that bitsandbytes lacks makes the folder our own
    nested = any(layer.double_quant for layer in layers)
    experts = any(map(is_experts, layers))
    quantization = packed_entry(QuantConfig(layers[0].book, layers[0].blocksize, nested), dense_linears(model), experts)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"quantization_config": quantization, "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_older_keys(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def is_packed_folder(folder: str) -> bool:
    """Whether a local folder's config says that it is packed, by bitsandbytes in four bits or by minilora; or a GGUF file has blocks."""
    if file := gguf_in(folder):
        return has_blocks(file)
    said = _entry(folder)
    return said.get("quant_method") == METHOD or (
        said.get("quant_method") == "bitsandbytes" and bool(said.get("load_in_4bit"))
    )


def packing_said(folder: str) -> QuantConfig:
    """How a packed folder's config says that it is packed. A codebook that is not known here has levels of no meaning.

    Raises:
        CheckpointError: the config says what no packed folder does.
    """
    said = _entry(folder)
    if said.get("quant_method") == METHOD:
        name, bits, size = said.get("format"), said.get("bits"), said.get("blocksize")
        nested = said.get("double_quant")
    else:
        name, bits, size, nested = said.get("bnb_4bit_quant_type"), 4, 64, said.get("bnb_4bit_use_double_quant", False)
        name = name if name in OF_BITSANDBYTES else None
    try:
        if not (isinstance(name, str) and name.isidentifier() and type(bits) is int and bits in (2, 3, 4, 8)):
            raise ConfigError("format")
        if type(nested) is not bool:
            raise ConfigError("double_quant")
        book = CODEBOOKS.get(name) or Codebook(name, (0.0,) * 2**bits, "only its width is known")
        return QuantConfig(book, size, nested)  # type: ignore[arg-type]
    except ConfigError:
        raise CheckpointError(
            f"model {folder!r}: its config.json says that it is packed as {str(said)[:200]}; wanted a format, its bits, a blocksize, and "
            "double quantization true or false, as a packed folder has them"
        ) from None


def _entry(folder: str) -> dict[str, Any]:
    file = Path(folder) / "config.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def load_packed(
    folder: str,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    device: torch.device | str = "cpu",
    rows: Rows | None = None,
    **options: Any,
) -> Any:
    """A model from such a folder: packed layers as ``QuantLinear``, everything else dense in ``dtype``; each weight goes from the file to
    its device before the next one is read.

    Args:
        rows: this process's; of the weights in the model's blocks nothing else is kept.
        options: more for ``from_config``, such as ``attn_implementation``.

    Raises:
        CheckpointError: a file is missing or damaged, or holds tensors that do not fit the model; each by name.
    """
    import transformers

    try:
        config, make = read_config(folder, folder, trust_remote_code), transformers.AutoModelForCausalLM.from_config
        with torch.device("meta"):
            model = make(config, dtype=dtype, trust_remote_code=trust_remote_code, **options)
        with open_tensors(Path(folder)) as tensors:
            fill(model, _Folder(tensors), dtype, torch.device(device), folder, rows)
        return model.eval()
    except Exception as error:  # of a damaged config anything can come, out of the middle of transformers
        raise unreadable(folder, error) from None


class _Folder:
    """The tensors of such a folder, as ``fill`` asks for them."""

    what, said = "the weights", "config.json"

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._groups, left = _packed_groups(tensors)
        self.packed: Sequence[str] = list(self._groups)
        self.shapes = {name: tensors.shapes[name] for name in left}

    def weight(self, name: str) -> QuantizedTensor | QuantizedStack:
        """A packed weight."""
        return from_disk({suffix: self._tensors.read(name + suffix) for suffix in self._groups[name]}, name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A dense tensor; what has no fraction keeps its dtype."""
        tensor = self._tensors.read(name)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _packed_groups(tensors: Tensors) -> tuple[dict[str, list[str]], dict[str, None]]:
    """Each packed weight with what is appended to its name for its parts, and the names of all other tensors, in order."""
    groups: dict[str, list[str]] = {weight_of(name): [] for name in sorted(tensors.shapes) if is_state(name)}
    left: dict[str, None] = {}
    for name in tensors.shapes:
        if (weight := weight_of(name)) in groups:
            groups[weight].append(name.removeprefix(weight))
        else:
            left[name] = None
    return groups, left

"""A model from a GGUF file, its blocks left as they lie there: what llama.cpp multiplies with is what an adapter is trained on.

Names come from the map of llama.cpp's converter, and transformers' processors undo what it did to values: Llama's rows of queries and keys
are put back in order as whole rows of bytes, and Gemma's norms, which are held one larger, are made smaller. Next file:
``hf/gguf_tokenizer.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError
from minilora.files.validate import shown
from minilora.gguf.file import GGUF, open_gguf
from minilora.gguf.kinds import import_gguf
from minilora.gguf.names import names_in
from minilora.hf.fill import fill
from minilora.hf.folders import import_transformers, unreadable
from minilora.hf.gguf_config import gguf_config
from minilora.linear.layers import is_conv1d, is_linear
from minilora.lora.match import ALL_LINEAR
from minilora.qlora.quantize_model import quantizable_paths, quantize_model
from minilora.quant.blockwise import quantize
from minilora.quant.config import QuantConfig
from minilora.quant.gguf.formats import FORMATS
from minilora.quant.gguf.tensor import GGUFTensor, gguf_tensor
from minilora.quant.quantized import QuantizedTensor
from minilora.training.rows import Rows

__all__ = ["gguf_skeleton", "held", "load_gguf"]

_READ_APART = ("rope_freqs.weight",)  # by the config
_EMBEDDINGS = ("token_embd.weight", "position_embd.weight", "output.weight")  # no processor changes them
_NUMBERS = ("F32", "F16", "BF16", "F64")


def load_gguf(
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    quant: QuantConfig | None = None,
    rows: Rows | None = None,
    **options: Any,
) -> Any:
    """The model in eval mode: linear layers packed as the file has them, everything else dense in ``dtype``, weight by weight.

    Args:
        quant: how linear layers are packed while they are read, where the file has none in blocks; else nothing.
        rows: this process's; of the weights in the model's blocks nothing else is kept.
        options: more for ``from_config``, such as ``attn_implementation``.

    Raises:
        CheckpointError: the file, its architecture, an entry or a tensor of it is not one that can be read; each by name.
    """
    with open_gguf(path) as file:
        try:
            model = _empty(file, dtype, **options)
            source = _Blocks(file, model, dtype, quant)
            _refuse_shards_of_experts(file, source, rows)
            fill(model, source, dtype, torch.device(device), str(path), rows)
            if quant is not None and source.experts and not source.blocks:  # experts are read whole, and packed at last
                quantize_model(model, quant)
        except Exception as error:
            raise unreadable(str(path), error) from None
    model.config._name_or_path = str(path)
    return model.eval()


def _refuse_shards_of_experts(file: GGUF, source: _Blocks, rows: Rows | None) -> None:
    if rows is not None and source.experts:
        raise CheckpointError(
            f"{file.path}: has experts, which are not shared out among processes as they are read from a GGUF file; leave --shard out"
        )


def gguf_skeleton(path: Path, dtype: torch.dtype, packed: bool = False) -> Any:
    """The model without memory: dense, or with its packed layers (``packed``), for a plan."""
    with open_gguf(path) as file:
        model = _empty(file, dtype)
        if packed:
            source = _Blocks(file, model, dtype, None, on="meta")
            fill(model, source, dtype, torch.device("meta"), str(path))
        return model.eval()


def held(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """How the linear layers of a file are held: types that stay packed with how many there are, and types in blocks that become dense."""
    with open_gguf(path) as file:
        model = _empty(file, torch.float32)
        kinds = [(target, file.tensors[name].kind.name) for name, target in _named(file, model).items()]
    linear = [kind for target, kind in kinds if _linear_at(model, target) is not None]
    packed = Counter(kind for kind in linear if kind in FORMATS)
    dense = [kind for kind in linear if kind not in FORMATS] + [kind for target, kind in kinds if _of_experts(target)]
    others = Counter(kind for kind in dense if kind not in _NUMBERS)
    return dict(sorted(packed.items())), dict(sorted(others.items()))


def _empty(file: GGUF, dtype: torch.dtype, **options: Any) -> Any:
    transformers, config = import_transformers(), gguf_config(file)
    try:
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    except Exception as error:  # of sides that no tensor has anything can come
        raise unreadable(str(file.path), error) from None


def _processor(file: GGUF, model: Any) -> Any:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    return TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())


def _named(file: GGUF, model: Any) -> dict[str, str]:
    """What each tensor of the file is called in the model. Raises ``CheckpointError`` for one that the model has no place for."""
    known = _names(file, model.config.num_hidden_layers, list(model.state_dict()))
    names = [name for name in file.tensors if name not in _READ_APART]
    if strange := [name for name in names if name not in known]:
        raise CheckpointError(
            f"{file.path}: {shown(strange[0])} has no place in a {file.architecture} model as it is read here; load the model that the "
            "file was made of"
        )
    return {name: known[name] for name in names}


def _names(file: GGUF, layers: int, targets: list[str]) -> dict[str, str]:
    """The names in a file of tensors that a model calls ``targets``, by the map that llama.cpp's converter uses; of experts' several."""
    gguf = import_gguf()
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    table, found = gguf.get_tensor_name_map(number, layers), dict[str, str]()
    for target in targets:
        path, _, own = target.rpartition(".")
        if _of_experts(target):
            found |= dict.fromkeys(names_in(file).of_experts(target, file.tensors.__contains__), target)
        elif (name := table.get_name(path)) is not None:
            found[f"{name}.{own}"] = target
    return found


def _of_experts(target: str) -> bool:
    return target.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def _linear_at(model: Any, weight: str) -> nn.Module | None:
    """The linear layer whose weight has this name, if it is one and not the embedding's."""
    path, _, own = weight.rpartition(".")
    layer = model.get_submodule(path)
    tied = layer is model.get_output_embeddings() and model.config.tie_word_embeddings
    return layer if own == "weight" and is_linear(layer) and not tied else None


class _Blocks:
    """The tensors of a GGUF file by the model's names, as ``fill`` asks for them."""

    what, said = "the tensors", "its metadata"

    def __init__(
        self, file: GGUF, model: Any, dtype: torch.dtype, quant: QuantConfig | None, on: str | None = None
    ) -> None:
        self.file, self.dtype, self.on = file, dtype, on
        self._names: dict[str, list[str]] = {}
        for name, target in _named(file, model).items():
            self._names.setdefault(target, []).append(name)
        self._layers = {target: layer for target in self._names if (layer := _linear_at(model, target)) is not None}
        self._refuse_other_shapes(model.state_dict())
        self._processor = _processor(file, model)
        self._quant: QuantConfig | None = None
        self.experts = any(map(_of_experts, self._names))
        self.packed: Sequence[str] = [target for target in self._layers if self._kind(target) in FORMATS]
        self.blocks = bool(self.packed)
        if not self.packed and quant is not None:  # numbers: packed as those of any other model
            self._quant = quant
            paths = [f"{path}.weight" for path in quantizable_paths(model, ALL_LINEAR)]
            self.packed = [target for target in paths if target in self._layers]
        self.shapes = {target: self._shape(target) for target in self._names if target not in self.packed}

    def _refuse_other_shapes(self, wanted: Mapping[str, Tensor]) -> None:
        for target, (name, *_) in self._names.items():
            if (own := self._shape(target)) != tuple(wanted[target].shape):
                raise CheckpointError(
                    f"{self.file.path}: {name} is {list(own)}, the model wants {list(wanted[target].shape)}; {self.what} do not fit "
                    f"{self.said}"
                )

    def _kind(self, target: str) -> str:
        return self.file.tensors[self._names[target][0]].kind.name

    def _shape(self, target: str) -> tuple[int, ...]:
        shapes = [self.file.tensors[name].shape for name in self._names[target]]
        if len(shapes) > 1:  # experts' gates and ups, which a model holds in one
            return (shapes[0][0], sum(shape[1] for shape in shapes), *shapes[0][2:])
        (shape,) = shapes
        if target.endswith("shared_expert_gate.weight") and len(shape) == 1:
            return (1, *shape)
        return shape[::-1] if target in self._layers and is_conv1d(self._layers[target]) else shape

    def weight(self, target: str) -> QuantizedTensor | GGUFTensor:
        """A packed weight: the file's own blocks, or numbers in blocks of ``quant``."""
        (name,) = self._names[target]
        if self._quant is not None:
            return quantize(self._rows(target, self.file.values(name)).to(self.dtype), self._quant, target)
        info = self.file.tensors[name]
        if self.on is not None:
            unread = torch.empty(info.shape[0], info.nbytes // info.shape[0], dtype=torch.uint8, device=self.on)
            return GGUFTensor(unread, info.kind.name, torch.Size(info.shape), self.dtype)
        raw = self._rows(target, self.file.blocks(name))
        return gguf_tensor(raw, info.kind.name, info.shape, self.dtype, f"{self.file.path}: {name}")

    def _rows(self, target: str, rows: Tensor) -> Tensor:
        """Rows ``[out, ...]``, bytes or numbers, in the model's order; those of a ``Conv1D`` stay so, as a packed one has them."""
        if is_conv1d(self._layers[target]):
            return rows
        return self._processed(self._names[target][0], rows)

    def read(self, target: str, dtype: torch.dtype) -> Tensor:
        """A dense tensor."""
        if self.on is not None:
            return torch.empty(self._shape(target), dtype=dtype, device=self.on)
        if _of_experts(target):
            return torch.cat([self.file.values(name, dtype) for name in self._names[target]], 1)
        (name,) = self._names[target]
        if name in _EMBEDDINGS:
            return self.file.values(name, dtype)
        return self._processed(name, self.file.values(name)).to(dtype).view(self._shape(target)).contiguous()

    def _processed(self, name: str, values: Tensor) -> Tensor:
        """As transformers' processor of the architecture leaves it."""
        found = self._processor.process(values.numpy(), name, tensor_key_mapping={}, parsed_parameters={"tensors": {}})
        return torch.from_numpy(found.weights.copy())

"""Packed weights straight from ``from_pretrained``: minilora as one of transformers' quantizers.

    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=minilora.hf.NF4Config())

Weights are packed one by one while they are read, so memory holds the packed model and a few dense tensors, never the dense model.
Every linear layer but the output head becomes the same ``QuantLinear`` that ``quantize_model`` makes. ``save_pretrained`` writes
bitsandbytes' format where it has one (``packed.py``). transformers 5.24 is what the tests run with.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from minilora.errors import (
    CheckpointError,
    ConfigError,
    MiniLoraError,
    MissingPackageError,
    QuantizationError,
    TargetError,
    nearest,
)
from minilora.files import validate
from minilora.hf.packed import METHOD, dense_linears, packed_entry, packed_state_dict
from minilora.linear.experts.hook import put_layer
from minilora.linear.experts.known import owner_of, projections
from minilora.linear.experts.layers import ExpertsLinear, QuantExperts, with_stored
from minilora.linear.layers import QuantLinear, dense_weight, in_out_features, is_conv1d, is_quantized, with_weight
from minilora.lora.bare import Bare
from minilora.lora.change import Change
from minilora.lora.match import ALL_LINEAR
from minilora.lora.slots import has_adapters
from minilora.lora.targets import Selection, check_form
from minilora.qlora.quantize_model import quantizable_paths
from minilora.quant.blockwise import quantize
from minilora.quant.codebooks import Codebook
from minilora.quant.config import QuantConfig
from minilora.quant.quantized import empty_quantized
from minilora.training.rows import Rows

__all__ = ["NF4Config", "NF4Quantizer"]

OLDEST = (5, 21)  # of transformers

# What transformers would do to the names of a model's weights when it saves them.
_CONVERSIONS = "_minilora_conversions"

logger = logging.get_logger(__name__)


class Failure:
    """Why a weight could not be packed, known once loading has failed; one object in every copy that transformers makes of a config."""

    error: MiniLoraError | None = None

    def __deepcopy__(self, memo: Any) -> Failure:
        return self


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """How ``from_pretrained`` packs linear layers; the fields of ``QuantConfig`` (NF4, blocksize 64, single, absmax by default).

    Args:
        format, blocksize, double_quant, scale, signed_scale: as in ``QuantConfig``.
        skip_modules: names of layers that stay dense, beside the output head.
        importance: what ``calibrate`` returned, for ``scale="weighted"``; never saved.
        target_modules: as in ``quantize_model``: the layers to pack; None for every linear layer but the output head and what
            transformers keeps in fp32.

    Raises:
        ConfigError: as ``QuantConfig``.
    """

    def __init__(
        self,
        format: str | Codebook = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        scale: str = "absmax",
        signed_scale: bool = False,
        skip_modules: list[str] | None = None,
        importance: Mapping[str, Tensor] | None = None,
        target_modules: Selection | None = None,
    ) -> None:
        self.quant = QuantConfig(format, blocksize, double_quant, scale, signed_scale)
        if isinstance(skip_modules, str):
            raise ConfigError(f"skip_modules={skip_modules!r}: wanted a list of names; write [{skip_modules!r}]")
        chosen = validate.names("skip_modules", skip_modules)
        if scale == "weighted" and not importance:
            raise ConfigError("scale='weighted': wanted importance=minilora.calibrate(model, batches)")
        self.quant_method = METHOD
        self.skip_modules = None if chosen is None else list(chosen)
        self.importance = importance
        if target_modules is not None:
            check_form(target_modules, "target_modules")
        self.target_modules = target_modules
        self.why = Failure()
        self.packs = True  # this and the next as ``packing_config`` says
        self.rows: Rows | None = None
        # Names of the experts' weights that are packed; known once a model is being loaded.
        self.experts: set[str] = set()
        self.dense: list[str] = []  # what stayed dense; known once a model is loaded, and again when it is saved

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """transformers asks for it where a folder's config says ``quant_method: minilora``. Raises ``ConfigError``."""
        raise ConfigError("this folder is packed in minilora's own layout; open it with minilora.hf.load_model(folder)")

    def to_dict(self) -> dict[str, Any]:
        """The entry of ``config.json``: bitsandbytes' where it has the format, for any program that reads its checkpoints."""
        return packed_entry(self.quant, self.dense or self.skip_modules or [], bool(self.experts))


def packing_config(quant: QuantConfig | None, rows: Rows | None = None) -> NF4Config:
    """The config by which ``from_pretrained`` packs what ``quantize_model(model, quant)`` would, nothing for None; and cuts to ``rows``."""
    known = quant or QuantConfig()
    fields = (known.format, known.blocksize, known.double_quant, known.scale, known.signed_scale)
    config = NF4Config(*fields, target_modules=ALL_LINEAR)
    config.packs, config.rows = quant is not None, rows
    return config


class _Pack(ConversionOps):
    """One dense tensor of the file to the parameters of its ``QuantLinear``, or to a process's rows of it."""

    def __init__(self, config: NF4Config, waiting: set[str]) -> None:
        self.config, self.waiting = config, waiting

    def convert(
        self, input_dict: Mapping[str, Any], model: Any = None, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        stored: dict[str, Any] = {}
        rows = self.config.rows
        try:
            for name, found in input_dict.items():
                path, _, own = name.rpartition(".")
                value = found[0] if isinstance(found, list) else found
                if name in self.config.experts:
                    self._pack_experts(name, model, value, missing_keys)
                    self.waiting.discard(name)
                elif own == "weight" and is_quantized(model.get_submodule(path)):
                    stored |= self._packed(name, model.get_submodule(path), value, missing_keys)
                    self.waiting.discard(path)
                elif rows is not None and rows.expects(name):
                    stored[name] = rows.keep(name, value)
                else:
                    stored[name] = value  # made of the same tensor of the file, and not packed
        except MiniLoraError as error:  # transformers logs it and goes on
            self.config.why.error = self.config.why.error or error
            raise
        return stored

    def _pack_experts(self, name: str, model: Any, weight: Tensor, missing_keys: set[str] | None) -> None:
        """Put the packed projection ``name`` in the place of the parameter of that name, which transformers then waits for no longer."""
        owner, _, own = name.rpartition(".")
        home = model.get_submodule(owner)
        dense = projections(home)[own]
        if weight.shape != dense.weight.shape:
            shapes = f"is {list(weight.shape)}, the model wants {list(dense.weight.shape)}"
            raise CheckpointError(f"{name}: {shapes}; the weights do not fit config.json")
        layer = QuantExperts.from_experts(with_stored(dense, weight), self.config.quant, name)
        if self.config.rows is not None:
            self.config.rows.keep_packed(name, layer)
        with Change() as change:
            put_layer(change, home, own, layer)
        for part in (home, owner_of(home)):
            part._is_hf_initialized = True  # or transformers draws the weights that it misses there
        (missing_keys or set()).discard(name)

    def _packed(self, name: str, layer: Any, weight: Tensor, missing_keys: set[str] | None) -> dict[str, Tensor]:
        """The parameters of ``layer`` by their names in the model, from the dense weight that the file calls ``name``."""
        path = name.removesuffix(".weight")
        rows = weight if layer.conv1d is None else weight.t()
        wanted = (layer.out_features, layer.in_features)
        if tuple(rows.shape) != wanted:  # of packed weights transformers does not ask
            shape = list(wanted if layer.conv1d is None else wanted[::-1])
            raise CheckpointError(
                f"{name}: is {list(weight.shape)}, the model wants {shape}; the weights do not fit config.json"
            )
        packed = QuantLinear(quantize(rows, self.config.quant, name, (self.config.importance or {}).get(path)))
        layer.dtype = packed.dtype
        if (
            layer.double_quant and not packed.double_quant
        ):  # its scales do not fit into 8 bits; the model waits for no second ones
            layer.double_quant, layer.nested_absmax, layer.nested_offset = False, None, None
            layer.absmax = nn.Parameter(torch.empty_like(packed.absmax, device="meta"), requires_grad=False)
            for part in ("nested_absmax", "nested_offset"):
                (missing_keys or set()).discard(f"{path}.{part}")
        layer._is_hf_initialized = True
        if self.config.rows is not None:
            self.config.rows.keep_packed(name, packed)
        return {f"{path}.{part}": values for part, values in packed.state_dict().items()}


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """What transformers asks while it loads, saves and trains a model."""

    requires_calibration = False
    quantization_config: NF4Config
    _loaded: weakref.ref[Any] | None = None

    def __init__(self, quantization_config: NF4Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._waiting: set[str] = set()  # packed layers that the file has not filled yet

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raises ``MissingPackageError`` for a transformers that casts each weight to the dtype of the codes before it is packed."""
        found = transformers.__version__
        if tuple(int(number) for number in found.split(".")[:2]) < OLDEST:
            raise MissingPackageError(
                f"packing while a model is loaded needs transformers {OLDEST[0]}.{OLDEST[1]} or newer, found {found}; "
                "run 'pip install --upgrade minilora[hf]'"
            )

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether it goes through ``_Pack``; of what does, transformers does not compare shapes, and of rows it must not."""
        path, _, own = param_name.rpartition(".")
        rows = self.quantization_config.rows
        if param_name in self.quantization_config.experts:
            return True
        if is_quantized(model.get_submodule(path)):
            return own == "weight" or (own != "bias" and rows is not None)
        return rows is not None and rows.expects(param_name)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per weight that this process keeps, of which transformers asks a GPU for as many before it reads."""
        rows = self.quantization_config.rows
        if param_name in self.quantization_config.experts:
            size = self.quantized_element_size
        elif is_quantized(model.get_submodule(param_name.rpartition(".")[0])):
            size = super().param_element_size(model, param_name, param)
        else:
            size = float(param.element_size())
        return size / rows.processes.size if rows is not None and rows.expects(param_name) else size

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight, which transformers plans device maps by."""
        return empty_quantized((64, 4096), self.quantization_config.quant, torch.float32).bits_per_weight / 8

    def get_quantize_ops(self) -> _Pack:
        return _Pack(self.quantization_config, self._waiting)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.rows is not None:
            config.rows.expect(model)
        bare = Bare(model)
        kinds = (nn.Linear, ExpertsLinear)
        chosen = {path: layer for path, layer in bare.named_modules() if type(layer) in kinds or is_conv1d(layer)}
        for path in self._to_pack(model, chosen):
            layer: Any = bare.get_submodule(path)
            if isinstance(layer, ExpertsLinear):  # packed as a whole once transformers has gathered all experts
                config.experts.add(path)
                self._waiting.add(path)
                continue
            if config.importance is not None and path not in config.importance:
                raise QuantizationError(f"{path}: importance has no entry for it; calibrate the same model")
            columns, rows = in_out_features(layer)
            packed = empty_quantized((rows, columns), config.quant, layer.weight.dtype, layer.weight.device)
            kind = type(layer) if is_conv1d(layer) else None
            model.set_submodule(path, QuantLinear(packed, layer.bias, kind))
            self._waiting.add(path)
        config.dense.extend(path for path in chosen if path not in self._waiting)

    def _to_pack(self, model: Any, linear: Mapping[str, nn.Module]) -> list[str]:
        """Paths of the layers that are packed; ``linear`` are all that there are."""
        config = self.quantization_config
        if not config.packs:
            return []
        for name in config.skip_modules or ():
            if all(should_convert_module(path, [name]) for path in linear):
                raise TargetError(f"skip_modules: {name!r} is no linear layer; the closest are {nearest(name, linear)}")
        if config.target_modules is not None:
            skip = config.skip_modules or []
            return [
                path for path in quantizable_paths(model, config.target_modules) if should_convert_module(path, skip)
            ]
        kept = model._keep_in_fp32_modules
        skip = self.get_modules_to_not_convert(model, config.skip_modules, kept, add_default_skips=True)
        return [path for path in linear if should_convert_module(path, skip)]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._waiting:
            path = min(self._waiting)
            name = path if path in self.quantization_config.experts else f"{path}.weight"
            raise CheckpointError(
                f"{name}: is not in the file, so there is nothing to pack; copy the model again, or leave this layer dense and new "
                f"with NF4Config(skip_modules=[{path!r}])"
            )
        for layer in model.modules():
            if is_quantized(layer):
                for parameter in layer.parameters():
                    parameter.requires_grad_(False)
        self._loaded = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of the model do not know it."""
        return {name: value for name, value in self.__dict__.items() if name != "_loaded"}

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` can write the model."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        self._convert(model, not any(isinstance(layer, QuantExperts) for layer in model.modules()))
        if not any(is_quantized(layer) for layer in model.modules()):  # all merged: an ordinary dense model
            self.remove_quantization_config(model)
            return None, {}
        self.quantization_config.dense = dense_linears(model)
        return packed_state_dict(model), {}

    def _convert(self, model: Any, plain: bool) -> None:
        """Let transformers write the experts of a model one by one, as its files have them; not while they are packed together."""
        own = vars(model)
        if not plain and _CONVERSIONS not in own:
            own[_CONVERSIONS] = own.get("_weight_conversions")
            model._weight_conversions = []
        elif plain and _CONVERSIONS in own:
            model._weight_conversions = own.pop(_CONVERSIONS)

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the Trainer may take the model as it is: once it has adapters. (transformers asks PEFT's class otherwise.)"""
        model = None if self._loaded is None else self._loaded()
        return model is None or has_adapters(model)

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # a saved model's config holds the name
        for path, layer in list(model.named_modules()):
            if is_quantized(layer):
                dense = with_weight(layer, dense_weight(layer).to(kind or layer.dtype))
                owner, _, name = path.rpartition(".")
                with Change() as change:
                    put_layer(change, model.get_submodule(owner), name, dense)
        self._convert(model, True)
        return model

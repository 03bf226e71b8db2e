"""Base layers: the one place that knows which way round a weight lies, and what it takes to multiply with one.

``nn.Linear`` keeps its weight ``[out, in]``, GPT-2's ``Conv1D`` keeps it ``[in, out]``, a ``PackedLinear`` keeps bytes, a
convolution a kernel, ``nn.MultiheadAttention`` a bare parameter. Everybody else asks the functions here and always gets ``[out, in]``;
of the experts of a mixture ``[experts, out, in]``. Next file: ``linear/cuda.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from minilora.errors import QuantizationError, TargetError
from minilora.linear.convolution import is_convolution, patch_weight, put_patch_weight
from minilora.linear.experts.layers import (
    ExpertsLinear,
    QuantExperts,
    as_model_keeps,
    is_experts,
    rows_of_experts,
    with_experts,
)
from minilora.linear.experts.routers import is_named_router
from minilora.linear.foreign import foreign_of
from minilora.linear.fronts import Front, put_in_front, take_from_front
from minilora.linear.frozen import PackedLinear
from minilora.linear.fused import Weight, lora_linear
from minilora.linear.ops import cpu_has_bf16, dequantize, flowing_dtype, is_transformed, product_dtype, quant_linear
from minilora.linear.packed import (
    QuantLinear,
    calls_only_forward,
    hooks_of,
    is_conv1d,
    rows_of,
    take_attributes,
    take_hooks,
)
from minilora.quant.config import QuantConfig


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can take this layer: ``nn.Linear``, ``Conv1D``, ``PackedLinear``, or another library's packed layer.

    A router that is a Linear by class and computes more (Llama 4, Phi-MoE) is none. The output projection of ``nn.MultiheadAttention`` is
    a Linear by class only: its weight is read and it is never called.
    """
    if is_attention_output(module) or is_router(module):
        return False
    return isinstance(module, (nn.Linear, PackedLinear)) or is_conv1d(module) or is_foreign(module)


def is_foreign(layer: nn.Module) -> bool:
    """Whether another library has packed this layer (``linear/foreign.py``)."""
    return foreign_of(layer) is not None


def kind_of(layer: nn.Module) -> str | None:
    """Which kind of layer an adapter would stand on: "linear", "embedding", "convolution", "attention", "experts", "router"; None for any
    other.
    """
    if is_linear(layer):
        return "linear"
    if is_experts(layer):
        return "experts"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    if is_convolution(layer):
        return "convolution"
    if isinstance(layer, nn.MultiheadAttention):
        return "attention"
    return "router" if is_router(layer) else None


def is_router(module: nn.Module) -> bool:
    """Whether this chooses experts with a matrix ``weight [experts, in]`` that its own forward reads, and holds no linear layers."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not is_named_router(module) or is_plain(module):
        return False
    return not any(isinstance(part, (nn.Linear, PackedLinear)) for part in module.modules() if part is not module)


def is_attention_output(module: nn.Module) -> bool:
    """Whether this is the ``out_proj`` that torch gives its ``nn.MultiheadAttention``."""
    return type(module).__name__ == "NonDynamicallyQuantizableLinear"


class Frozen(Front):
    """Put in front of the class of a dense layer (``in_front``): while its weight is frozen, a dtype that the processor cannot multiply
    is multiplied in fp32. Everything else goes its usual way.
    """

    def forward(self, x: Tensor) -> Tensor:
        kind = flowing_dtype(x)
        if product_dtype(kind, x.device) == kind or not carries(self, x):
            return super().forward(x)
        return lora_linear(x, frozen_weight(self), self.bias)  # type: ignore[arg-type]


class CastsBias(Front):
    """Put in front of the class of a layer whose half-precision bias trains: it is kept in fp32, where small steps are not lost, and the
    layer sees it in the dtype of its weight.
    """

    @property
    def bias(self) -> Tensor | None:
        """The bias as ``forward`` uses it."""
        held, weight = self._parameters.get("bias"), self._parameters.get("weight")
        return held if held is None or weight is None or held.dtype == weight.dtype else held.to(weight.dtype)


def in_front(layers: Iterable[nn.Module]) -> None:
    """Give dense frozen layers the class ``Frozen`` where that can help: on a CPU without bf16 products, or with an fp16 weight."""
    for layer in layers:
        if (type(layer) is nn.Linear or (is_conv1d(layer) and not isinstance(layer, Frozen))) and _is_slow(layer):
            put_in_front(layer, Frozen)


def _is_slow(layer: nn.Module) -> bool:
    weight: Any = layer.weight
    return weight.device.type == "cpu" and (not cpu_has_bf16() or weight.dtype == torch.float16)


def take_back(model: nn.Module) -> None:
    """Undo ``in_front``, and take every other front of a layer away."""
    for layer in model.modules():
        take_from_front(layer, Frozen, CastsBias)


def in_out_features(layer: nn.Module) -> tuple[int, int]:
    """``(in, out)`` of a layer's ``[out, in]``, or of an adapter around one: of an embedding ``(dimension, tokens)``, of a convolution
    ``(numbers in a patch, channels)``, of an attention its input projection's.
    """
    known: Any = layer
    if isinstance(layer, nn.MultiheadAttention):
        return layer.embed_dim, 3 * layer.embed_dim
    if is_convolution(layer):
        return layer.in_channels * math.prod(layer.kernel_size), layer.out_channels
    if hasattr(layer, "in_features"):
        return int(known.in_features), int(known.out_features)  # some models write a tensor of one number there
    if is_conv1d(layer):
        return known.weight.shape[0], known.weight.shape[1]
    if is_router(layer):
        return known.weight.shape[1], known.weight.shape[0]
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    raise _no_weight(layer)


def dense_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of ``dense_weight``, without making it."""
    columns, rows = in_out_features(layer)
    return (layer.experts, rows, columns) if isinstance(layer, (ExpertsLinear, QuantExperts)) else (rows, columns)


def _no_weight(layer: nn.Module) -> TargetError:
    return TargetError(
        f"{type(layer).__name__} is not a linear layer; wanted Linear, Conv1D or QuantLinear; of an adapted "
        "layer, its get_base_layer()"
    )


def weight_name(layer: nn.Module) -> str:
    """What the parameter is called that ``[out, in]`` is about."""
    if (foreign := foreign_of(layer)) is not None:
        return foreign.parameter
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


def stored_weight(layer: Any) -> Any:
    """That parameter, packed or dense; None where the layer has none of its own (it is computed, or lies elsewhere)."""
    return layer._parameters.get(weight_name(layer))


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer's own ``weight`` is ``[in, out]``: a ``Conv1D``, packed or not."""
    return is_conv1d(layer) or (isinstance(layer, PackedLinear) and layer.conv1d is not None)


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The floating dtype of a layer's weight (of the weight before quantization, for a quantized layer; fp32 where it is not known)."""
    if (foreign := foreign_of(layer)) is not None:
        return foreign.dtype(layer) or torch.float32
    return layer.dtype if isinstance(layer, (PackedLinear, QuantExperts)) else getattr(layer, weight_name(layer)).dtype


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight as ``[out, in]``, of experts ``[experts, out, in]``, detached; shares memory with the layer unless it is quantized."""
    if isinstance(layer, PackedLinear):
        whole = layer.quantized()
        return dequantize(whole) if torch.compiler.is_compiling() or is_transformed() else whole.dequantize()
    if (foreign := foreign_of(layer)) is not None:
        return foreign.dense(layer).detach().to(compute_dtype(layer))
    if isinstance(layer, QuantExperts):
        return layer.quantized().dequantize()
    if isinstance(layer, ExpertsLinear):
        return rows_of_experts(layer, layer.weight.detach())
    if isinstance(layer, (nn.Linear, nn.Embedding)) or is_conv1d(layer) or is_router(layer):
        return rows_of(layer)
    if is_convolution(layer):
        return patch_weight(layer)
    if isinstance(layer, nn.MultiheadAttention):
        return layer.in_proj_weight.detach()
    raise _no_weight(layer)


def as_stored(layer: nn.Module, weight: Tensor) -> Tensor:
    """``[out, in]`` the way round that ``layer`` keeps its weight; of a convolution without its groups."""
    if is_convolution(layer):
        return put_patch_weight(layer, weight)
    if isinstance(layer, (ExpertsLinear, QuantExperts)):
        return as_model_keeps(layer, weight)
    return weight.t() if is_transposed(layer) else weight


def frozen_weight(layer: nn.Module) -> Weight:
    """The weight ``[out, in]`` as it is stored: packed, or a view of the parameter."""
    if isinstance(layer, nn.Linear):
        return layer.weight
    return layer.quantized() if isinstance(layer, PackedLinear) else dense_weight(layer)


def carries(layer: nn.Module, x: Tensor) -> bool:
    """Whether calling this layer is nothing but its product with a frozen weight, so that ``lora_linear`` may take its place.

    No: hooks on the call, a ``forward`` of its own, a weight that trains or is no plain tensor, a dtype that does not fit (the layer's
    own error is the better one), and the transforms of ``torch.func`` and ``torch.compile``, which want plain formulas.
    """
    weight: Any = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.requires_grad or not (type(x) is Tensor or type(x) is nn.Parameter):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed() or not calls_only_forward(layer):
        return False
    if not x.is_floating_point() or x.device.type == "meta":
        return False
    if isinstance(layer, PackedLinear):
        return type(layer).forward is PackedLinear.forward
    return is_plain(layer) and (weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type))


def is_plain(layer: nn.Module) -> bool:
    """Whether a call of its class is known to be the product with the weight, and nothing else."""
    if type(layer).__call__ is not nn.Module.__call__:
        return False
    return type(layer).forward in _PRODUCTS or (
        is_conv1d(layer) and type(layer).__module__ == "transformers.pytorch_utils"
    )


_PRODUCTS = (nn.Linear.forward, Frozen.forward)


def embed_scale(layer: nn.Module) -> float:
    """The constant by which some models' embeddings multiply their rows; an update must be multiplied too. 1 for all others."""
    return float(getattr(layer, "embed_scale", 1.0))


def product(layer: nn.Module, x: Tensor) -> Tensor:
    """``x W^T`` without the bias, whatever the layer: ``[..., in]`` to ``[..., out]`` (of a convolution: patches to channels)."""
    if isinstance(layer, PackedLinear):
        return quant_linear(x, layer.quantized())
    return torch.nn.functional.linear(x, dense_weight(layer))


def with_weight(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A new frozen layer like ``layer`` that holds ``weight`` ``[out, in]``; ``layer`` itself is untouched.

    Class, settings and hooks are the layer's, and so are the modules in it. A quantized layer becomes the kind of dense layer that it
    was, a convolution one without groups. ``bias`` replaces the bias, which is otherwise shared with ``layer``.
    """
    if isinstance(layer, (ExpertsLinear, QuantExperts)):
        return with_experts(layer, weight)
    like = _dense_like(layer) if isinstance(layer, PackedLinear) or is_foreign(layer) else layer
    new = copy.copy(like)
    take_from_front(new, Frozen)
    for name in (
        "forward",
        "_old_forward",
        "_hf_hook",
    ):  # bound to the old object; accelerate's move tensors between devices
        new.__dict__.pop(name, None)
    put_parameters(new, {weight_name(like): nn.Parameter(as_stored(like, weight).contiguous(), requires_grad=False)})
    if is_convolution(new):
        new.groups = 1
    shared: Any = new._parameters.get("bias")
    if bias is None and is_foreign(layer) and shared is not None and shared.dtype != weight.dtype:
        bias = shared.detach().to(weight.dtype)  # which these layers cast to whatever they are given
    if bias is not None:
        put_parameters(new, {"bias": nn.Parameter(bias, requires_grad=False)})
    return new


def put_parameters(layer: Any, changed: Mapping[str, Any]) -> None:
    """Give a shallow copy of a layer other parameters, or tensors in their place; the layer that it was copied from keeps its own."""
    for name in changed:
        layer.__dict__.pop(name, None)  # FSDP1 has its views there, before all parameters
    layer._parameters = {**layer._parameters, **changed}


def _dense_like(layer: Any) -> nn.Module:
    """A dense layer without memory, of the kind that was packed, with the packed one's bias and hooks."""
    sizes = (layer.in_features, layer.out_features)
    with torch.device("meta"):
        dense = layer.conv1d(*sizes[::-1]) if is_transposed(layer) else nn.Linear(*sizes)
    dense._parameters["bias"] = layer.bias
    take_hooks(dense, hooks_of(layer))
    take_attributes(dense, layer)
    return dense.train(layer.training)


def is_quantized(layer: nn.Module) -> TypeGuard[PackedLinear | QuantExperts]:
    """Whether the layer's weight is packed: of a linear layer, or of experts."""
    return isinstance(layer, (PackedLinear, QuantExperts))


def is_ours(layer: nn.Module) -> TypeGuard[QuantLinear | QuantExperts]:
    """Whether the layer is packed in codes that minilora writes too; those of a GGUF file are only read."""
    return isinstance(layer, (QuantLinear, QuantExperts))


def packed_like(layer: nn.Module, dense: nn.Module, name: str) -> nn.Module:
    """``dense`` packed as the packed ``layer`` is.

    Raises:
        QuantizationError: as ``quantize``, or the layer is packed in a format that is read and not written.
    """
    known: Any = layer
    if not is_ours(layer):
        raise QuantizationError(
            f"{name}: is packed as {known.format}, a format of GGUF that is read here and not written; leave requantize out, and the "
            "merged layer is dense"
        )
    config = QuantConfig(known.book, known.blocksize, known.double_quant)
    return pack(dense, config, name)


def pack(layer: nn.Module, config: QuantConfig, name: str = "weight", importance: Tensor | None = None) -> nn.Module:
    """A dense linear layer or projection of experts with its weight packed. Arguments and errors as ``quantize``."""
    if isinstance(layer, ExpertsLinear):
        return QuantExperts.from_experts(layer, config, name)
    return QuantLinear.from_linear(layer, config, name, importance)

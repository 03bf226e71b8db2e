"""What every program is given of an adapter: the two factors of each layer, with the layer's true scale folded into B.

Next file: ``export/plain_peft.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, StateError
from minilora.lora.adapter import Adapter
from minilora.lora.variants.attention import LoRAOutProj
from minilora.lora.variants.dora import DoRALinear
from minilora.lora.variants.embedding import Tied, TiedHead
from minilora.store.adapter_files import PREFIX, Stored, refuse_regexes
from minilora.store.contents import parameters_in

__all__ = ["Base", "Factor", "Factors", "NeedsBase", "factors_of", "stored_factors"]

# What each program can hold beside linear layers. A DoRA layer is a linear one with a magnitude.
_HOLDS = {
    "vllm": ("linear layers", "embeddings"),
    "llama.cpp": ("linear layers",),
    "mlx": ("linear layers", "embeddings", "experts", "DoRA"),
    "diffusers": ("linear layers", "convolutions", "DoRA"),
}
_KINDS = {"linear": "linear layers", "embedding": "embeddings", "convolution": "convolutions", "experts": "experts"}
_NAMES = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "m"}


class NeedsBase(StateError):
    """The folder alone does not say it; with the base model it can be exported."""


@dataclass(frozen=True)
class Factor:
    """The update of one layer, ``B @ A``.

    Attributes:
        A: ``[r, in]`` fp32; of experts ``[E, r, in]``; of a convolution over patches, ``in`` being channels times kernel.
        B: ``[out, r]`` fp32, the scaling in it; of experts ``[E, out, r]``. Of an embedding ``out`` counts tokens.
        kind: "linear", "embedding", "convolution" or "experts". kernel: of a convolution.
        magnitude: ``[out]``, where the layer is DoRA's.
    """

    A: Tensor
    B: Tensor
    kind: str = "linear"
    kernel: tuple[int, ...] = ()
    magnitude: Tensor | None = None

    @property
    def r(self) -> int:
        """The rank."""
        return self.A.shape[-2]


Factors = Mapping[str, Factor]


def _same_table(table: Any, head: Any) -> bool:
    """Whether head and embedding are one weight, or a copy (``untie``): a program that loads the published base has one for both then."""
    layers = [each.innermost if isinstance(each, Adapter) else each for each in (table, head)]
    one, other = (getattr(layer, "weight", None) for layer in layers)
    return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)


@dataclass(frozen=True)
class Base:
    """What is known of the base model.

    Attributes:
        model_type: of its config, "" for unknown. tied: whether its head is its embedding, or was; None for unknown.
        head: the path of its head. head_follows: whether a tied head has the update of its embedding's adapter.
        model_class: the class's name and the library that it is from.
    """

    model_type: str = ""
    tied: bool | None = None
    head: str = "lm_head"
    head_follows: bool = False
    model_class: tuple[str, str] = ("", "")

    @classmethod
    def of(cls, model: nn.Module, values: Mapping[str, object]) -> Base:
        """Of a model in memory with these adapters."""
        kind = next(c for c in type(model).__mro__ if not c.__module__.startswith("minilora"))
        table, head = (getattr(model, f"get_{end}put_embeddings", lambda: None)() for end in ("in", "out"))
        names = [name for name, module in model.named_modules() if head is not None and module is head]
        return cls(
            str(getattr(getattr(model, "config", None), "model_type", "") or ""),
            _same_table(table, head),
            names[0] if names else "",
            any(isinstance(value, TiedHead) for value in values.values()),
            (kind.__name__, kind.__module__.partition(".")[0]),
        )

    @classmethod
    def stored(cls, stored: Stored) -> Base:
        """Of an adapter folder alone."""
        name, module = stored.model_class
        kind = "gpt2" if stored.config.fan_in_fan_out else ""  # the one architecture that keeps its weights so
        return cls(kind, model_class=(name, module.partition(".")[0]))


def factors_of(values: Mapping[str, object], target: str) -> dict[str, Factor]:
    """Of the adapters of a model, by path; a head that follows its embedding's adapter is not among them.

    Raises:
        StateError: one that the program cannot hold.
    """
    follows = target == "mlx"  # whose tied head is the embedding itself
    return {p: _factor(p, v, target) for p, v in values.items() if not (follows and isinstance(v, TiedHead))}


def _factor(path: str, value: object, target: str) -> Factor:
    if not isinstance(value, Adapter):
        raise StateError(
            f"{path}: {target} cannot hold a trained copy or bias; merge the adapter into the model instead"
        )
    kind = _KINDS.get(value.on, "")
    if isinstance(value, (LoRAOutProj, Tied)) or kind not in _HOLDS[target]:
        raise StateError(
            f"{path}: {target} takes adapters of {_taken(target)} only; merge this one into the model instead"
        )
    if isinstance(value, DoRALinear) and "DoRA" in _HOLDS[target]:
        return _dora(path, value)
    try:
        A, B = value.as_lora()
    except StateError as error:
        raise StateError(f"{path}: {error}") from None
    return Factor(A, B, value.on, _kernel(path, value, target))


def _taken(target: str) -> str:
    kinds = [kind for kind in _HOLDS[target] if kind != "DoRA"]
    return " and ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))


def _dora(path: str, value: DoRALinear) -> Factor:
    if bool((value.row_norms() == 0).any()):
        raise StateError(
            f"{path}: a row of its weight is zero, and others divide by its norm; merge the adapter instead"
        )
    A, B = value.factors()
    magnitude = value.lora_magnitude_vector.float()
    return Factor(A, value.scaling * B, value.on, _kernel(path, value, "diffusers"), magnitude)


def _kernel(path: str, value: Adapter, target: str) -> tuple[int, ...]:
    if value.on != "convolution":
        return ()
    layer = value.innermost
    if layer.groups != 1:
        raise StateError(
            f"{path}: {target} reads no adapter of a convolution with groups as minilora does; merge instead"
        )
    return tuple(layer.kernel_size)  # type: ignore[arg-type]


# ---- from the file alone


def stored_factors(stored: Stored, target: str) -> dict[str, Factor]:
    """Scaled factors from the file alone.

    Raises:
        NeedsBase: what they mean depends on the base model. StateError: what the program cannot hold. CheckpointError: a damaged file.
    """
    if stored.variant != "lora" and not (stored.variant == "dora" and "DoRA" in _HOLDS[target]):
        raise NeedsBase(f"{stored.path}: a {stored.variant} adapter depends on its base model; give it with --model")
    refuse_regexes(stored)
    for path in parameters_in(stored).values():
        if "experts" in _HOLDS[target]:
            raise NeedsBase(
                f"{stored.path}: {path} is a projection of experts, which each architecture names anew; give its base with --model"
            )
        raise StateError(
            f"{stored.path}: {path} is a projection of experts, and other programs differ in how they read those; merge instead"
        )
    if routers := [entry for entry in stored.config.target_parameters or () if entry.endswith("weight")]:
        raise StateError(f"{stored.path}: {routers[0]} is no weight that other programs adapt; merge instead")
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.tensors.items():
        path, name = _split(stored, key, tensor, target)
        parts.setdefault(path, {})[name] = tensor.float()
    return {path: _stored_factor(stored, path, pair) for path, pair in parts.items()}


def _split(stored: Stored, key: str, tensor: Tensor, target: str) -> tuple[str, str]:
    """Path of the layer, and A, B or m."""
    name = key.removeprefix(PREFIX)
    if "lora_embedding_" in key and "embeddings" in _HOLDS[target]:
        raise NeedsBase(f"{stored.path}: {key} is of an embedding, which a head may share; give the base with --model")
    if name.endswith(".base_layer.weight") and "embeddings" in _HOLDS[target]:
        raise NeedsBase(
            f"{stored.path}: {key} is the base's own table, which an export is not for; give the base with --model"
        )
    for ending, half in _NAMES.items():
        path, dims = name.removesuffix(f".{ending}"), tensor.dim()
        if path != name and ".base_layer." not in key and (half == "m" or dims == 2 or _is_kernel(dims, target)):
            return path, half
    raise StateError(
        f"{stored.path}: {key} is no factor of {'a linear layer' if len(_HOLDS[target]) == 1 else _taken(target)}, and other "
        f"programs cannot hold it; merge instead"
    )


def _is_kernel(dims: int, target: str) -> bool:
    return dims > 2 and "convolutions" in _HOLDS[target]


def _stored_factor(stored: Stored, path: str, pair: Mapping[str, Tensor]) -> Factor:
    if not {"A", "B"} <= pair.keys():
        raise StateError(f"{stored.path}: {path} has only one of lora_A and lora_B; save the adapter again")
    A, B = pair["A"], pair["B"]
    wanted, found = stored.config.for_module(path)[0], len(A)
    if wanted != found:
        raise CheckpointError(f"{stored.path}: {path} has rank {found}, the config says {wanted}; save it again")
    if B.shape[1] != found:
        raise StateError(
            f"{stored.path}: {path} is a convolution with groups, which other programs read otherwise; merge instead"
        )
    kernel = tuple(A.shape[2:])
    scaled = stored.config.scaling(path) * B.flatten(1)
    return Factor(A.flatten(1), scaled, "convolution" if kernel else "linear", kernel, pair.get("m"))

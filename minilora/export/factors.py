"""What every program is given of an adapter: the two factors of each layer, with the layer's true scale folded into B.

Which kinds of layers a program can hold is one table. Next file: ``export/stored.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from minilora.errors import StateError
from minilora.files.parse import tensor_bytes
from minilora.lora.adapter import Adapter
from minilora.lora.variants.attention import LoRAOutProj
from minilora.lora.variants.dora import DoRALinear
from minilora.lora.variants.embedding import Tied, TiedHead
from minilora.quant.finite import is_finite

__all__ = ["GGUF", "HOLDS", "Factor", "Factors", "Laid", "factors_of", "name_of", "nonfinite", "taken_by"]

GGUF = "gguf"  # what a GGUF LoRA holds; "llama.cpp" alone is what its converter reads

# What each program can hold beside linear layers. A DoRA layer is a linear one with a magnitude.
HOLDS = {
    "vllm": ("linear layers", "embeddings"),
    "llama.cpp": ("linear layers",),
    GGUF: ("linear layers", "embeddings", "experts"),
    "mlx": ("linear layers", "embeddings", "experts", "DoRA"),
    "diffusers": ("linear layers", "convolutions", "DoRA"),
}
_KINDS = {"linear": "linear layers", "embedding": "embeddings", "convolution": "convolutions", "experts": "experts"}


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


@dataclass(frozen=True)
class Laid:
    """What a program reads, before it is bytes; the tensors may be on "meta", where it is asked only whether the program takes it.

    Attributes:
        weights: name of the file with the tensors. tensors: by their names in it. texts: the other files.
    """

    weights: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    def files(self) -> dict[str, bytes]:
        """Name to content."""
        texts = {name: text.encode() for name, text in self.texts.items()}
        return {self.weights: tensor_bytes(self.tensors, self.metadata), **texts}


def factors_of(values: Mapping[str, object], target: str) -> dict[str, Factor]:
    """Of the adapters of a model, by path; a head that follows its embedding's adapter is not among them.

    Raises:
        StateError: one that the program cannot hold.
    """
    follows = target == "mlx"  # whose tied head is the embedding itself
    found = {p: _factor(p, v, target) for p, v in values.items() if not (follows and isinstance(v, TiedHead))}
    for path, factor in found.items():
        if not (is_finite(factor.A) and is_finite(factor.B)):
            raise nonfinite(path)
    return found


def nonfinite(path: str) -> StateError:
    """Of a layer with a number that is none once it is scaled."""
    return StateError(f"{path}: its scaled factors hold NaN or infinity, so nothing is exported; load an earlier save")


def name_of(target: str) -> str:
    """The program, for messages."""
    return "llama.cpp" if target == GGUF else target


def _factor(path: str, value: object, target: str) -> Factor:
    if not isinstance(value, Adapter):
        raise StateError(
            f"{path}: {name_of(target)} cannot hold a trained copy or bias; merge the adapter into the model instead"
        )
    kind = "linear" if isinstance(value, TiedHead) else value.on
    no_layer = (LoRAOutProj,) if target == GGUF else (LoRAOutProj, Tied)  # a served file may have the head as a tensor
    if isinstance(value, no_layer) or _KINDS.get(kind) not in HOLDS[target]:
        experts = target == "llama.cpp" and kind == "experts"  # which a GGUF LoRA has a place for
        way = "give --base SERVED.gguf, or merge this one" if experts else "merge this one"
        raise StateError(
            f"{path}: {name_of(target)} takes adapters of {taken_by(target)} only; {way} into the model instead"
        )
    if isinstance(value, DoRALinear) and "DoRA" in HOLDS[target]:
        return _dora(path, value)
    try:
        A, B = value.as_lora()
    except StateError as error:
        raise StateError(f"{path}: {error}") from None
    return Factor(A, B, kind, _kernel(path, value, target))


def taken_by(target: str) -> str:
    """The kinds of layers that a program takes, in words."""
    kinds = [kind for kind in HOLDS[target] if kind != "DoRA"]
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

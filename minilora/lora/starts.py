"""Settings of the start values that are made from data or from the weight: objects for fields of ``LoraConfig``, named as PEFT's.

``EvaConfig`` belongs to ``variants/eva.py``, ``CordaConfig`` to ``variants/corda.py``, ``LoraGAConfig`` to ``variants/lora_ga.py``,
``LoftQConfig`` to ``variants/loftq.py``. In a file each is a dictionary.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from minilora.errors import ConfigError, KindError, nearest
from minilora.files import validate

__all__ = ["CordaConfig", "EvaConfig", "LoftQConfig", "LoraGAConfig", "LoraRuntimeConfig"]

T = TypeVar("T")
_LARGEST_RHO = 2**31 - 1  # no layer has more ranks


def _choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={validate.shown(value)}: wanted one of {', '.join(map(repr, choices))}")


@dataclass(frozen=True)
class EvaConfig:
    """Settings of EVA.

    Args:
        rho: a layer may get up to ``rho * r`` ranks, >= 1; 1 leaves the ranks as they are.
        tau: a direction counts as found when two batches one after the other agree on it to this cosine, in [0, 1].
        use_label_mask, label_mask_value: leave out tokens whose label is this value.
        whiten: divide the directions by the roots of their singular values.
        adjust_scaling_factors: a layer whose rank changes gets the lora_alpha that keeps its scaling.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        for name, value in (("rho", self.rho), ("tau", self.tau)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"{name}={validate.shown(value)}: wanted a number")
        if not 1 <= self.rho <= _LARGEST_RHO:
            raise ConfigError(f"`rho` must be >= 1.0 and finite, and is {validate.shown(self.rho)}; 2.0 is usual")
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"`tau` must be between 0.0 and 1.0. It is {validate.shown(self.tau)}; 0.99 is usual")
        label = self.label_mask_value
        if type(label) is not int or not -(2**63) <= label < 2**63:
            raise ConfigError(f"label_mask_value={validate.shown(label)}: wanted a label; -100 is usual")
        for name in ("use_label_mask", "whiten", "adjust_scaling_factors"):
            validate.flag(name, getattr(self, name))


@dataclass(frozen=True)
class CordaConfig:
    """Settings of CorDA.

    Args:
        cache_file: keeps the start factors; if it is there, nothing is computed.
        covariance_file: keeps the covariances of the inputs, from which factors of any rank are made.
        corda_method: "ipm" starts from what the data needs most, "kpm" from what it needs least.
        verbose: show the progress.
        use_float16_for_covariance: half the memory, and less exact.
        prune_temporary_fields: forget the covariances after use.
    """

    cache_file: str | os.PathLike[str] | None = None
    covariance_file: str | os.PathLike[str] | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        _choice("corda_method", self.corda_method, ("ipm", "kpm"))
        for name in ("cache_file", "covariance_file"):
            if (value := getattr(self, name)) is not None:
                value = os.fspath(value) if isinstance(value, os.PathLike) else value
                validate.text(name, value)
                object.__setattr__(self, name, value)
        for name in ("verbose", "use_float16_for_covariance", "prune_temporary_fields"):
            validate.flag(name, getattr(self, name))


@dataclass(frozen=True)
class LoraGAConfig:
    """Settings of LoRA-GA.

    Args:
        direction: which singular directions of the gradient A and B take: "ArB2r" the first r and the second r, "A2rBr" the other way
            round, "ArBr" in turns, "random" the same random ones.
        scale: "stable" for a size that depends on the layer's width alone, "weight_svd" for that of the weight, "gd_scale" for that of
            a step of gradient descent, "unit" as it comes.
        stable_gamma: of "stable"; larger starts smaller.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int | float = 16

    def __post_init__(self) -> None:
        _choice("direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random"))
        _choice("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        validate.positive("stable_gamma", self.stable_gamma, "16 is usual")


@dataclass(frozen=True)
class LoftQConfig:
    """Settings of LoftQ: bits of the base layer (2, 3 or 4) and turns of quantizing and factorizing."""

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        validate.loftq(vars(self))


@dataclass
class LoraRuntimeConfig:
    """What PEFT does at run time and no file holds.

    ``ephemeral_gpu_offload`` computes on a GPU what is offloaded to the CPU. Here an adapter is computed where its layer is, with the same
    numbers, so the flag is kept and not used.
    """

    ephemeral_gpu_offload: bool = False

    def __post_init__(self) -> None:
        validate.flag("ephemeral_gpu_offload", self.ephemeral_gpu_offload)


def settings(name: str, value: object, kind: type[T]) -> T | None:
    """The value of a field as an object of ``kind``: one already, the dictionary that a file has, or None.

    Raises:
        KindError: something else. ConfigError: a key that is not known.
    """
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise KindError(f"{name}={validate.shown(value)}: wanted a {kind.__name__}, a dict, or None")
    known: Any = kind
    names = [field.name for field in dataclasses.fields(known)]
    for key in value:
        if key not in names:
            close = nearest(key if isinstance(key, str) else "", names)
            raise ConfigError(f"{name}: unknown key {validate.shown(key)}; the closest known ones are {close}")
    return kind(**value)

"""The words for where a model goes and how it is packed: device, dtype, attention, quant. Nothing here needs torch or transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from minilora.errors import ConfigError
from minilora.files import validate
from minilora.quant.codebooks import CODEBOOKS
from minilora.quant.config import QuantConfig

__all__ = [
    "ATTENTION",
    "AUTO",
    "DTYPE_CHOICES",
    "DTYPE_NAMES",
    "QUANT_CHOICES",
    "check_place",
    "check_quant",
    "packing",
]

AUTO = "auto"
QUANT_CHOICES = ("none", *CODEBOOKS)
DTYPE_NAMES = ("float32", "bfloat16", "float16")
DTYPE_CHOICES = (AUTO, *DTYPE_NAMES)
ATTENTION = (AUTO, "eager", "sdpa")  # and what else transformers has, when it is there to be asked
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,4})?")


def check_quant(quant: str) -> None:
    """Raise ``ConfigError`` for a word that is no format."""
    if quant not in ("none", *CODEBOOKS):  # with those that were registered since
        known = ", ".join(("none", *CODEBOOKS))
        raise ConfigError(
            f"quant={validate.shown(quant)}: wanted one of {known}; a codebook of your own is known once --plugin FILE names its file"
        )


def check_place(device: str, dtype: str, attention: str) -> None:
    """Raise ``ConfigError`` for words that mean no place anywhere; ``hf/devices.py`` asks this machine."""
    if not isinstance(device, str) or not _DEVICE.fullmatch(device):
        raise ConfigError(f"device={validate.shown(device)}: wanted auto, cpu, cuda, cuda:N (as cuda:0) or mps")
    _one_of("dtype", dtype, DTYPE_CHOICES)
    validate.text("attention", attention)


def packing(quant: str, double_quant: bool) -> QuantConfig | None:
    """How linear layers are packed; None leaves them dense."""
    return None if quant == "none" else QuantConfig(quant, double_quant=double_quant)


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={validate.shown(value)}: wanted one of {', '.join(choices)}")

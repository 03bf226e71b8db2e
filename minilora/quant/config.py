"""How a weight is stored: ``QuantConfig``, a frozen dataclass that validates itself when built. Next file: ``quant/blockwise.py``."""

from __future__ import annotations

from dataclasses import dataclass

from minilora.errors import ConfigError, QuantizationError
from minilora.files import validate
from minilora.quant.codebooks import Codebook, codebook

SCALE_RULES = ("absmax", "mse", "weighted")


@dataclass(frozen=True)
class QuantConfig:
    """How a weight is stored (Dettmers et al. 2023, arXiv 2305.14314): codes of a table, one scale per block.

    Args:
        format: name of a codebook in ``codebooks.py``, or a ``Codebook`` of your own.
        blocksize: weights that share one scale; a power of two from 32 to 4096.
        double_quant: keep the scales themselves in 8 bits (4.127 instead of 4.5 bits per weight at blocksize 64).
        scale: how a block's scale is chosen: "absmax", "mse" (least squared error) or "weighted" (by E[x^2] of the inputs; ``calibrate``).
        signed_scale: let a scale be negative, which turns an asymmetric table round.

    Raises:
        ConfigError: for a value that cannot be meant.
    """

    format: str | Codebook = "nf4"
    blocksize: int = 64
    double_quant: bool = False
    scale: str = "absmax"
    signed_scale: bool = False

    def __post_init__(self) -> None:
        size = self.blocksize
        if isinstance(size, bool) or not isinstance(size, int) or not 32 <= size <= 4096 or size & (size - 1):
            raise ConfigError(f"blocksize={validate.shown(size)}: wanted a power of two from 32 to 4096; 64 is usual")
        try:
            codebook(self.format)
        except QuantizationError as error:
            raise ConfigError(str(error)) from None
        for name in ("double_quant", "signed_scale"):
            validate.flag(name, getattr(self, name))
        if self.scale not in SCALE_RULES:
            raise ConfigError(f"scale={validate.shown(self.scale)}: wanted one of {', '.join(map(repr, SCALE_RULES))}")


def quant_config(config: QuantConfig | None) -> QuantConfig:
    """The config, or the default for None. Raises ``ConfigError`` for anything else."""
    if config is not None and not isinstance(config, QuantConfig):
        raise ConfigError(f"config={validate.shown(config)}: wanted a QuantConfig, such as QuantConfig('nf4')")
    return config or QuantConfig()

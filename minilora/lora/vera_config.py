"""VeRA's own config: PEFT's ``VeraConfig``, and its ``adapter_config.json``. Next file to read: ``lora/variants/vera.py``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from minilora.errors import ConfigError, nearest
from minilora.files import validate
from minilora.lora import config_file
from minilora.lora.config import LoraConfig

__all__ = ["VeraConfig"]

# Fields of both, and what PEFT's file calls those that are about VeRA alone.
_COMMON = (
    "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "modules_to_save",
    "r", "revision", "target_modules", "task_type",
)  # fmt: skip
_OWN = ("d_initial", "init_weights", "projection_prng_key", "save_projection")
_ABOUT = ("auto_mapping", "peft_type", "peft_version")
_KEYS = frozenset((*_COMMON, *_OWN, *_ABOUT, "vera_dropout"))
# LoRA's fields that say nothing where all layers share their factors.
_NOT_VERAS = (
    "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "init_lora_weights", "trainable_token_indices",
    "ensure_weight_tying", "target_parameters", "alora_invocation_tokens", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
)  # fmt: skip


@dataclass
class VeraConfig(LoraConfig):
    """What to adapt with VeRA (``lora/variants/vera.py``), under PEFT's names: ``r`` is 256 by default, and there is no ``lora_alpha``.

    Args:
        d_initial: start value of ``vera_lambda_d``, > 0.
        projection_prng_key: seed of the two shared random matrices.
        save_projection: whether the file holds them; without, they are drawn again from the key.
        init_weights: False starts as some update and not as none, for tests: ``vera_lambda_b`` = 1, ``vera_lambda_d`` normal.
        vera_dropout: as ``lora_dropout``. bias: "none", "all" or "vera_only".

    Raises:
        ConfigError: as ``LoraConfig``, and for a field of it that VeRA does not have.
    """

    file_keys: ClassVar[frozenset[str]] = _KEYS
    prefix: ClassVar[str] = "vera_lambda_"
    r: int = 256
    d_initial: float = 0.1
    projection_prng_key: int = 0
    save_projection: bool = True
    init_weights: bool = True

    def __post_init__(self) -> None:
        if self.bias == "vera_only":
            object.__setattr__(self, "bias", "lora_only")
        super().__post_init__()
        defaults = {f.name: f for f in dataclasses.fields(LoraConfig)}
        for name in _NOT_VERAS:
            held = defaults[name]
            plain = held.default if held.default_factory is dataclasses.MISSING else held.default_factory()
            if getattr(self, name) != plain:
                raise ConfigError(f"{name}={validate.shown(getattr(self, name))}: VeRA has no such field; leave it out")
        validate.positive("d_initial", self.d_initial)
        validate.flag("save_projection", self.save_projection)
        validate.flag("init_weights", self.init_weights)
        validate.whole("projection_prng_key", self.projection_prng_key, 0)

    @property
    def variant(self) -> str:
        """ "vera"."""
        return "vera"

    @property
    def peft_type(self) -> Any:
        """``PeftType.VERA``."""
        return config_file.PeftType.VERA

    @property
    def vera_dropout(self) -> float:
        """PEFT's name of ``lora_dropout``."""
        return self.lora_dropout

    def scaling(self, path: str) -> float:
        """1: the two trained vectors are all that scales."""
        return 1.0

    @classmethod
    def of(cls, config: LoraConfig) -> VeraConfig:
        """A plain config for the variant "vera". Raises ``ConfigError`` for a field that VeRA does not have."""
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})

    def in_file(self, content: dict[str, Any]) -> dict[str, Any]:
        """PEFT's content of a VeRA folder, from that of a LoRA folder."""
        own = {name: content[name] for name in (*_COMMON, *_OWN, *_ABOUT)}
        bias = "vera_only" if self.bias == "lora_only" else self.bias
        own |= {"peft_type": "VERA", "vera_dropout": self.lora_dropout, "bias": bias}
        return dict(sorted(own.items()))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "config") -> VeraConfig:
        """Read PEFT's dictionary. Raises ``ConfigError`` as ``LoraConfig.from_dict``."""
        if strange := sorted(content.keys() - _KEYS):
            raise ConfigError(
                f"{source}: unknown key {strange[0]!r}; the closest known ones are {nearest(strange[0], _KEYS)}"
            )
        kept = {name: value for name, value in content.items() if name not in _ABOUT and value is not None}
        try:
            return cls(**kept)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None


_init = VeraConfig.__init__


@functools.wraps(_init)
def _init_as_in_peft(self: VeraConfig, *args: Any, **fields: Any) -> None:
    """The fields under PEFT's names too. Raises ``TypeError`` for a field of neither."""
    if "vera_dropout" in fields:
        fields["lora_dropout"] = fields.pop("vera_dropout")
    config_file.refuse_set(
        {name: fields.pop(name) for name in list(fields) if name not in VeraConfig.__dataclass_fields__}, "VERA"
    )
    _init(self, *args, **fields)


VeraConfig.__init__ = _init_as_in_peft  # type: ignore[method-assign]

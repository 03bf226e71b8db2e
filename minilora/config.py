"""The two configs: what an adapter is (``LoraConfig``) and how a weight is stored (``QuantConfig``).

Both are frozen dataclasses that validate themselves when built, so no later code asks again. ``LoraConfig`` keeps the names and
defaults of PEFT 0.21.2 and reads and writes PEFT's ``adapter_config.json``; fields of PEFT that minilora does not offer are
accepted at their default, kept in the file, and refused by name otherwise. Next file to read: ``adapter.py``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from minilora.errors import ConfigError, nearest

BIAS_CHOICES = ("none", "all", "lora_only")
TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

# PEFT's remaining fields with their defaults: written to the file so that its key set is PEFT's, refused when set otherwise.
OUT_OF_SCOPE: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_bias": False,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "velora_config": None,
}
# Written by PEFT beside the fields; they describe the file, not the adapter.
FILE_FIELDS = ("auto_mapping", "peft_type", "peft_version")
PEFT_LAYOUT = "0.21.2"  # the PEFT release whose file layout this is; PEFT reads it to judge unknown keys


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: wanted a whole number >= {least}; set {name}=8, for example")


def _names(name: str, value: object) -> tuple[str, ...] | str | None:
    """Normalise a target field: a string stays (regex or keyword), any collection of strings becomes a sorted tuple."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (Sequence, set, frozenset)) and all(isinstance(entry, str) for entry in value):
        return tuple(sorted(set(value)))
    raise ConfigError(f"{name}={value!r}: wanted a list of module names or one regex string")


def _pattern(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name}={value!r}: wanted a dict of module-name pattern to number")
    for key in value:
        try:
            re.compile(key)
        except re.error as error:
            raise ConfigError(
                f"{name} key {key!r} is not a regular expression ({error}); escape its special signs"
            ) from None
    return dict(value)


def _positive(name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:  # type: ignore[operator, arg-type]
        raise ConfigError(f"{name}={value!r}: wanted a finite number > 0; lora_alpha = r or 2*r is usual")


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how (Hu et al. 2021, arXiv 2106.09685, section 4.1): ``y = W x + (lora_alpha / r) * B A x``.

    Args:
        r: rank of the update; ``lora_A`` is ``[r, in]`` and ``lora_B`` is ``[out, r]``.
        lora_alpha: numerator of the scaling ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with ``use_rslora``).
        target_modules: list of names (each matches whole dotted suffixes), one regex for the full path, ``"all-linear"``,
            or None for the default of the architecture.
        exclude_modules: same rules; taken away from the matches.
        lora_dropout: probability in [0, 1) of dropping an input of the low-rank path.
        fan_in_fan_out: kept for PEFT's sake; orientation is read from each layer, and the file says what was found.
        bias: which biases train: "none", "lora_only" (of the adapted layers), "all".
        modules_to_save: names of modules of which a full copy is trained and saved beside the adapter.
        init_lora_weights: True (A kaiming-uniform, B = 0), "gaussian" (A normal with std 1/r, B = 0), False (both random).
        rank_pattern, alpha_pattern: module-name regex to its own r or lora_alpha; the first that matches the path's end wins.
        task_type: one of TASK_TYPES or None.

    Raises:
        ConfigError: for a value that cannot be meant, naming the field, the value and what is wanted.
    """

    r: int = 8
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        _whole("r", self.r, 1)
        _positive("lora_alpha", self.lora_alpha)
        drop = self.lora_dropout
        if isinstance(drop, bool) or not isinstance(drop, (int, float)) or not 0 <= drop < 1:
            raise ConfigError(f"lora_dropout={drop!r}: wanted a probability in [0, 1); 0.05 is usual")
        if self.bias not in BIAS_CHOICES:
            raise ConfigError(f"bias={self.bias!r}: wanted one of {', '.join(map(repr, BIAS_CHOICES))}")
        put("task_type", getattr(self.task_type, "value", self.task_type))
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ConfigError(f"task_type={self.task_type!r}: wanted None or one of {', '.join(map(repr, TASK_TYPES))}")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(f"init_lora_weights={self.init_lora_weights!r}: wanted True, False or 'gaussian'")
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            put(name, _names(name, getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            raise ConfigError(
                f"modules_to_save={self.modules_to_save!r}: wanted a list of names; write [{self.modules_to_save!r}]"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            put(name, _pattern(name, getattr(self, name)))
        for key, rank in self.rank_pattern.items():
            _whole(f"rank_pattern[{key!r}]", rank, 1)
        for key, alpha in self.alpha_pattern.items():
            _positive(f"alpha_pattern[{key!r}]", alpha)

    def for_module(self, path: str) -> tuple[int, int | float]:
        """``(r, lora_alpha)`` of the module at ``path`` after the patterns (PEFT's rule: first key that matches the end)."""

        def chosen(pattern: Mapping[str, Any], default: Any) -> Any:
            return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)

        return chosen(self.rank_pattern, self.r), chosen(self.alpha_pattern, self.lora_alpha)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``adapter_config.json``: PEFT's key set, lists sorted, ``inference_mode`` true as PEFT saves it."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        content = {name: list(value) if isinstance(value, tuple) else value for name, value in own.items()}
        alpha = content["lora_alpha"]
        if isinstance(alpha, float) and alpha.is_integer():
            content["lora_alpha"] = int(alpha)  # Ollama's reader takes unsigned integers only
        content.update(OUT_OF_SCOPE, inference_mode=True, peft_type="LORA", peft_version=PEFT_LAYOUT, auto_mapping=None)
        return dict(sorted(content.items()))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "config") -> LoraConfig:
        """Read PEFT's dictionary.

        Raises:
            ConfigError: another ``peft_type``, an unknown key, or a field of PEFT's that minilora does not offer, each by name.
        """
        kind = content.get("peft_type", "LORA")
        if kind != "LORA":
            raise ConfigError(f"{source}: peft_type={kind!r}; minilora reads 'LORA' adapters only")
        own = {f.name for f in dataclasses.fields(cls)}
        for name, value in content.items():
            if name in OUT_OF_SCOPE and value not in (OUT_OF_SCOPE[name], None, False):
                raise ConfigError(
                    f"{source}: {name}={value!r} is a feature of PEFT that minilora does not offer; leave it at "
                    f"{OUT_OF_SCOPE[name]!r}"
                )
            if name not in own and name not in OUT_OF_SCOPE and name not in FILE_FIELDS:
                raise ConfigError(f"{source}: unknown key {name!r}; the closest known ones are {nearest(name, own)}")
        try:
            return cls(**{name: value for name, value in content.items() if name in own and value is not None})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None


@dataclass(frozen=True)
class QuantConfig:
    """How a weight is stored (Dettmers et al. 2023, arXiv 2305.14314): codes of a table, one scale per block.

    Args:
        format: name of a codebook in ``codebooks.py``.
        blocksize: weights that share one scale; a power of two from 32 to 4096.
        double_quant: keep the scales themselves in 8 bits (4.127 instead of 4.5 bits per weight at blocksize 64).

    Raises:
        ConfigError: for a value that cannot be meant.
    """

    format: str = "nf4"
    blocksize: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        size = self.blocksize
        if isinstance(size, bool) or not isinstance(size, int) or not 32 <= size <= 4096 or size & (size - 1):
            raise ConfigError(f"blocksize={size!r}: wanted a power of two from 32 to 4096; 64 is usual")
        if not isinstance(self.double_quant, bool):
            raise ConfigError(f"double_quant={self.double_quant!r}: wanted True or False")

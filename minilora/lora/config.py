"""What an adapter is: ``LoraConfig``.

It validates itself when built. Its fields may be set until a model takes it: that makes a copy of its own, which validates all fields
together and never changes again. It keeps the names and defaults of
PEFT 0.21.2, and reads and writes PEFT's ``adapter_config.json`` (``lora/config_file.py``). Next file to read: ``lora/layer.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from minilora.errors import CheckpointError, ConfigError, KindError, nearest, warn
from minilora.files import validate
from minilora.lora import config_file
from minilora.lora.patterns import Patterns
from minilora.lora.starts import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, LoraRuntimeConfig, settings

ABOUT_THE_FILE = ("base_model_name_or_path", "inference_mode", "revision", "task_type")  # these change no number
BIAS_CHOICES = ("none", "all", "lora_only")
TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass
class LoraConfig:
    """What to adapt and how (Hu et al. 2021, arXiv 2106.09685, section 4.1): ``y = W x + (lora_alpha / r) * B A x``.

    Args:
        r: rank of the update; ``lora_A`` is ``[r, in]`` and ``lora_B`` is ``[out, r]``.
        lora_alpha: a number > 0, numerator of the scaling ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with ``use_rslora``).
        target_modules: names of layers (each matches whole dotted suffixes), one regex for the full path, or ``"all-linear"``
            (in Python also None: the default of the architecture).
        exclude_modules: layers that are left out, named as in ``target_modules``.
        target_parameters: names of weights of experts, such as mlp.experts.gate_up_proj, which "all-linear" has too, and of routers, such
            as mlp.gate.weight, which are adapted only if they are named here.
        lora_dropout: probability in [0, 1) of dropping an input of the low-rank path.
        fan_in_fan_out: kept for PEFT's sake; orientation is read from each layer, and the file says what was found.
        bias: which biases train: "none", "lora_only" (of the adapted layers), "all".
        modules_to_save: names of modules of which a full copy is trained and saved beside the adapter.
        init_lora_weights: True (A kaiming-uniform, B = 0), "gaussian" (A normal with std 1/r, B = 0), False (both random),
            "orthogonal", "pissa", "pissa_niter_N", "olora", "mica", "loftq"; from data "eva", "corda" or "lora_ga" (each a file in
            ``variants/``), in any case. Of an embedding: A = 0 and B random, for all but "mica" and "loftq", as in PEFT.
        use_rslora: scaling ``lora_alpha / sqrt(r)``.
        use_dora: magnitude and direction apart (``variants/dora.py``).
        lora_bias: a trained bias on B, scaled as B is.
        layers_to_transform: index or indices of the layers to adapt, found behind ``layers_pattern`` or anywhere.
        layers_pattern: names that stand before the index of a layer in a path, such as "layers" or "h".
        trainable_token_indices: rows of the input embedding that train, as a list, or lists by name of the embedding (embed_tokens=1,2).
        ensure_weight_tying: an adapter on an embedding also changes the output head that is tied to it.
        loftq_config: settings of "loftq", such as loftq_bits=4 loftq_iter=5 (a ``LoftQConfig`` or a dictionary).
        eva_config: settings of "eva", such as rho=2 whiten=true (an ``EvaConfig`` or a dictionary).
        corda_config: settings of "corda", such as corda_method=kpm (a ``CordaConfig`` or a dictionary).
        lora_ga_config: settings of "lora_ga", such as direction=ArBr scale=stable (a ``LoraGAConfig`` or a dictionary).
        rank_pattern: r of some modules, such as q_proj=4 'layers.0.*=8' (in Python a dictionary): a name or a regular expression, of which
            the first counts that matches the end of a path.
        alpha_pattern: lora_alpha of some modules, named as in ``rank_pattern``.
        task_type: one of TASK_TYPES or None.
        alora_invocation_tokens: token ids from whose last occurrence in a row on the update is active (``variants/alora.py``).

    Raises:
        ConfigError: for a value that cannot be meant, naming the field, the value and what is wanted.
    """

    prefix: ClassVar[str] = "lora_"  # of the names of trained parameters
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
    use_dora: bool = False
    lora_bias: bool = False
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str | None = None
    trainable_token_indices: Sequence[int] | dict[str, Sequence[int]] | None = None
    ensure_weight_tying: bool = False
    loftq_config: dict[str, int] | LoftQConfig = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    layer_replication: None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    alora_invocation_tokens: Sequence[int] | None = None
    target_parameters: Sequence[str] | None = None
    in_use = False  # no field: whether a model has adapters of it

    def __getattr__(self, name: str) -> Any:
        """PEFT's remaining fields, which stand at their defaults."""
        if name == "runtime_config":
            return self.__dict__.setdefault(name, LoraRuntimeConfig())
        if name in config_file.OUT_OF_SCOPE:
            return config_file.OUT_OF_SCOPE[name]
        if name in config_file.ABOUT:
            return config_file.ABOUT[name]
        raise AttributeError(f"LoraConfig has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in config_file.OUT_OF_SCOPE or name in config_file.ABOUT:
            config_file.refuse_set({name: value})
            return
        if name == "runtime_config":
            self.__dict__[name] = settings(name, value, LoraRuntimeConfig) or LoraRuntimeConfig()
            return
        if name not in (own := type(self).__dataclass_fields__):
            raise ConfigError(f"{type(self).__name__} has no field {name!r}; the closest are {nearest(name, own)}")
        if self.in_use and name == "init_lora_weights" and (value is True or value == self.init_lora_weights):
            return  # PEFT's way to save a start that it has taken from the weight; files here say what they are, before and after
        if self.in_use and name not in ABOUT_THE_FILE:
            raise ConfigError(
                f"{name}={validate.shown(value)}: a model has adapters of this config already; change a config before a model gets it"
            )
        self.__dict__[name] = value
        for kept in ("rank_keys", "alpha_keys"):
            self.__dict__.pop(kept, None)

    def for_use(self) -> LoraConfig:
        """A copy, validated as a whole, that can no longer be changed. Raises ``ConfigError`` for what was set and cannot be meant."""
        own = self if self.in_use else dataclasses.replace(self)
        own.__dict__["in_use"] = True
        return own

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        validate.whole("r", self.r, 1)
        validate.positive("lora_alpha", self.lora_alpha)
        drop = self.lora_dropout
        if isinstance(drop, bool) or not isinstance(drop, (int, float)) or not 0 <= drop < 1:
            raise ConfigError(f"lora_dropout={validate.shown(drop)}: wanted a probability in [0, 1); 0.05 is usual")
        if self.bias not in BIAS_CHOICES:
            raise ConfigError(f"bias={validate.shown(self.bias)}: wanted one of {', '.join(map(repr, BIAS_CHOICES))}")
        put("task_type", getattr(self.task_type, "value", self.task_type))
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise ConfigError(
                f"task_type: Invalid task type: {validate.shown(self.task_type)}. Must be one of the following task types: "
                f"{', '.join(TASK_TYPES)}; task_type=None is for every other task"
            )
        if self.layer_replication is not None:
            raise ConfigError(
                f"layer_replication={validate.shown(self.layer_replication)}: {config_file.WHY_NOT['layer_replication']}"
            )
        for name in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying", "fan_in_fan_out", "inference_mode"):
            validate.flag(name, getattr(self, name))
        for name in ("base_model_name_or_path", "revision"):
            if getattr(self, name) is not None:
                validate.text(name, getattr(self, name))
        if isinstance(self.init_lora_weights, str):
            put("init_lora_weights", self.init_lora_weights.lower())  # "OLoRA" is as right
        self._check_settings(put)
        put("alora_invocation_tokens", validate.invocation(self.alora_invocation_tokens))
        self._check_start()
        validate.tokens(self.trainable_token_indices)
        self._check_places(put)
        for name in ("rank_pattern", "alpha_pattern"):
            put(name, validate.pattern(name, getattr(self, name)))
        for key, rank in self.rank_pattern.items():
            validate.whole(f"rank_pattern[{key!r}]", rank, 1)
        for key, alpha in self.alpha_pattern.items():
            validate.positive(f"alpha_pattern[{key!r}]", alpha)

    def _check_places(self, put: Callable[[str, object], None]) -> None:
        """The fields that say where: layers and names of modules."""
        put("layers_to_transform", validate.layers(self.layers_to_transform))
        put("layers_pattern", validate.names("layers_pattern", self.layers_pattern))
        for name in ("layers_to_transform", "layers_pattern"):
            given = getattr(self, name) not in (None, (), [], "")
            if given and isinstance(self.target_modules, str) and self.target_modules != "all-linear":
                raise ConfigError(
                    f"`{name}` cannot be used when `target_modules` is a str. A regex can name the layers itself; or give a list"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified; "
                f"layers_pattern={validate.shown(self.layers_pattern)} does nothing alone"
            )
        for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            put(name, validate.names(name, getattr(self, name)))
        if isinstance(self.target_parameters, str):
            said = validate.shown(self.target_parameters)
            raise ConfigError(f"target_parameters={said}: wanted a list of names; write [{said}]")
        put("target_parameters", self.target_parameters or None)  # PEFT writes an empty list
        if self.target_parameters and self.target_modules == ():
            put("target_modules", None)
        if isinstance(self.modules_to_save, str):
            said = validate.shown(self.modules_to_save)
            raise ConfigError(f"modules_to_save={said}: wanted a list of names; write [{said}]")

    def _check_settings(self, put: Callable[[str, object], None]) -> None:
        """The objects that belong to one start value, and say nothing for another."""
        given = self.loftq_config
        put("loftq_config", validate.loftq(dataclasses.asdict(given) if isinstance(given, LoftQConfig) else given))
        for name, kind in _SETTINGS.items():
            field, value = f"{name}_config", settings(f"{name}_config", getattr(self, f"{name}_config"), kind)
            if self.init_lora_weights == name and value is None and name != "lora_ga":
                word = "EVA" if name == "eva" else "CorDA"
                warn(f"`init_lora_weights` is '{name}' but `{field}` is not specified. Using default {word} config.")
                value = kind()
            elif self.init_lora_weights != name and value is not None:
                warn(f"`{field}` specified but will be ignored when `init_lora_weights` is not '{name}'.")
            put(field, value)

    def _check_start(self) -> None:
        init = self.init_lora_weights
        words = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "mica", "eva", "corda", "lora_ga")
        if not (
            isinstance(init, bool)
            or init in words
            or (isinstance(init, str) and validate.pissa_rounds(init) is not None)
        ):
            raise ConfigError(
                f"init_lora_weights={validate.shown(init)}: wanted True, False, 'pissa_niter_N' or one of {', '.join(map(repr, words))}"
            )
        if self.use_dora and self.variant != "dora":
            raise ConfigError(
                f"use_dora goes with init_lora_weights True, False or 'gaussian', not {init!r}; drop one of the two"
            )
        if self.alora_invocation_tokens and self.variant != "alora":
            raise ConfigError(
                f"alora_invocation_tokens goes with plain LoRA, not with {self.variant}; drop one of the two"
            )
        if self.lora_bias and self.variant != "lora":
            raise ConfigError(
                f"The argument lora_bias=True is for plain LoRA, not for {self.variant}; drop one of the two"
            )
        residual = ("pissa", "olora", "corda", "lora_ga")
        if self.use_rslora and (self.rank_pattern or self.alpha_pattern) and self.variant in residual:
            warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion to plain LoRA "
                f"(save_pretrained with path_initial_model_for_weight_conversion) does not work for {self.variant}; all else does"
            )

    @property
    def variant(self) -> str:
        """The registered variant that this config means."""
        init = self.init_lora_weights
        if isinstance(init, str) and init not in ("gaussian", "eva"):  # EVA is plain LoRA from another A
            return "pissa" if init.startswith("pissa") else init
        if self.use_dora:
            return "dora"
        return "alora" if self.alora_invocation_tokens else "lora"

    @property
    def pissa_rounds(self) -> int | None:
        """Rounds of the randomized SVD for "pissa_niter_N"; None for the exact one."""
        return validate.pissa_rounds(str(self.init_lora_weights))

    def for_module(self, path: str) -> tuple[int, int | float]:
        """``(r, lora_alpha)`` of the module at ``path`` after the patterns (PEFT's rule: first key that matches the end)."""

        rank, alpha = self.rank_keys.first(path), self.alpha_keys.first(path)
        r = self.r if rank is None else self.rank_pattern[rank]
        return r, self.lora_alpha if alpha is None else self.alpha_pattern[alpha]

    @functools.cached_property
    def rank_keys(self) -> Patterns:
        """The keys of ``rank_pattern``, to be asked which one means a path."""
        return Patterns(self.rank_pattern)

    @functools.cached_property
    def alpha_keys(self) -> Patterns:
        """The keys of ``alpha_pattern``."""
        return Patterns(self.alpha_pattern)

    def scaling(self, path: str) -> float:
        """The factor of the update at ``path``: ``lora_alpha / r``; with rsLoRA ``lora_alpha / sqrt(r)``."""
        r, lora_alpha = self.for_module(path)
        return lora_alpha / (math.sqrt(r) if self.use_rslora else r)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], subfolder: str | None = None, **fields: Any) -> LoraConfig:
        """The config of an adapter folder. Raises ``CheckpointError`` for the file and ``ConfigError`` for a field, by name.

        Args:
            folder: on this disk, or an id on the Hugging Face Hub.
            fields: are set instead of the file's; ``revision``, ``token``, ``cache_dir`` and the like say where the Hub has it.
        """
        # Only files need these, and parse imports torch: a config alone comes without.
        from minilora.files.hub import FETCH, fetched
        from minilora.files.parse import parse_json
        from minilora.files.read import read_bytes

        where = {name: fields.pop(name) for name in FETCH if name in fields}
        source = fetched(folder, subfolder or "", ("adapter_config.json",), (), where) / "adapter_config.json"
        raw = read_bytes(source, "the adapter's config")
        try:
            content = parse_json(raw)
        except ValueError as error:
            raise CheckpointError(f"{source}: not JSON that an adapter has ({error}); save the adapter again") from None
        if "peft_type" not in content:
            raise KindError(
                f"The LoraConfig config that is trying to be loaded is missing required keys: {{'peft_type'}}. {source}: wanted what "
                "save_pretrained wrote"
            )
        strange = unknown_keys(content)
        if strange:
            config_file.say_unknown(strange, source, content)
        known = {name: value for name, value in content.items() if name not in strange}
        own = {name: value for name, value in fields.items() if name in _OWN}
        return cls.from_dict(known | own, str(source))

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **_: Any) -> dict[str, Any]:
        """The content of a JSON file, as PEFT's function of this name returns it. Raises ``CheckpointError`` for what is none."""
        from minilora.files.parse import parse_json
        from minilora.files.read import read_bytes

        try:
            content = parse_json(read_bytes(Path(path_json_file), "the config"))
        except ValueError as error:
            raise CheckpointError(f"{path_json_file}: no JSON ({error})") from None
        content.pop("runtime_config", None)  # says how, and not what
        return content

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``adapter_config.json`` into the folder, which is made if need be."""
        from minilora.files.write import write_file

        write_file(Path(folder) / "adapter_config.json", json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """The content of ``adapter_config.json``: PEFT's key set, lists sorted, ``inference_mode`` true as PEFT saves it."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return self.in_file(config_file.content_of(own))

    def in_file(self, content: dict[str, Any]) -> dict[str, Any]:
        """The content with the keys of this method's files."""
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "config") -> LoraConfig:
        """Read PEFT's dictionary; of type VERA a ``VeraConfig``.

        Raises:
            ConfigError: another ``peft_type``, an unknown key, or a field of PEFT's that minilora does not offer, each by name.
        """
        if (other := config_file.of_another_method(content)) is not None:
            return other.from_dict(content, source)
        try:
            return cls(**config_file.own_fields(content, _OWN))
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None


_OWN = frozenset(LoraConfig.__dataclass_fields__)
_init = LoraConfig.__init__


@functools.wraps(_init)
def _init_as_in_peft(self: LoraConfig, *args: Any, **fields: Any) -> None:
    """The fields, and PEFT's remaining ones at their defaults. Raises ``ConfigError`` where one of these is set."""
    runtime = fields.pop("runtime_config", None)
    config_file.refuse_set({name: fields.pop(name) for name in list(fields) if name not in _OWN})
    _init(self, *args, **fields)
    if runtime is not None:
        self.runtime_config = runtime


LoraConfig.__init__ = _init_as_in_peft  # type: ignore[method-assign]
_SETTINGS: dict[str, type[Any]] = {"eva": EvaConfig, "corda": CordaConfig, "lora_ga": LoraGAConfig}


def unknown_keys(content: Mapping[str, Any]) -> list[str]:
    """The keys of an ``adapter_config.json`` that ``LoraConfig.from_dict`` refuses: newer than this file, or mistyped."""
    if (other := config_file.of_another_method(content)) is not None:
        return sorted(content.keys() - other.file_keys)
    return config_file.unknown_keys(content, _OWN)

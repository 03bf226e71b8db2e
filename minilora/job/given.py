"""A job from settings by name, as the flags of ``minilora train``, the keys of its TOML file and the keywords of ``fine_tune`` give them.

Every field of ``Job``, ``LoraConfig`` and ``TrainConfig`` is such a name. Next file: ``job/finetune.py``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from minilora.errors import ConfigError, nearest
from minilora.job.settings import FROM_DATA, Job
from minilora.lora.config import LoraConfig
from minilora.training.settings import TrainConfig

__all__ = ["job_from", "setting_names"]

_PARTS: dict[str, Any] = {"lora": LoraConfig, "training": TrainConfig}
_LORA = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}  # what a job adapts if nothing is said


def setting_names() -> set[str]:
    """Every setting of a job by its own name, those of its adapter and of its training among them."""
    return {entry.name for kind in (Job, *_PARTS.values()) for entry in dataclasses.fields(kind)} - _PARTS.keys()


def job_from(given: Mapping[str, Any]) -> Job:
    """The job that these settings ask for.

    Args:
        given: name to value; ``lora`` and ``training`` may be whole configs, of which single fields beside them are changed.

    Raises:
        ConfigError: a name that no setting has, one that is missing, or a value that cannot be meant, by name.
    """
    own: dict[str, dict[str, Any]] = {}
    rest = dict(given)
    for name, kind in _PARTS.items():
        fields = {entry.name for entry in dataclasses.fields(kind)}
        own[name] = {field: rest.pop(field) for field in fields & rest.keys()}
    known = {entry.name for entry in dataclasses.fields(Job)}
    if strange := sorted(rest.keys() - known):
        raise ConfigError(f"{strange[0]}: no setting of a job; the closest are {nearest(strange[0], setting_names())}")
    rest = {name: _as_text(value) for name, value in rest.items()}
    for name in ("model", "data", "out"):
        if name not in rest:
            raise ConfigError(f"{name} is missing; give {name}=...")
    lora, training = rest.pop("lora", None), rest.pop("training", None)
    whole = isinstance(training, TrainConfig) and training.epochs is not None
    if {"steps", "epochs"} <= own["training"].keys() | ({"epochs"} if whole else set()):
        raise ConfigError("steps and epochs both say how long the run is; give one of them")
    return Job(
        **rest,
        lora=_lora_of(own["lora"], rest.get("init_from")) if lora is None else _changed("lora", lora, own["lora"]),
        training=TrainConfig(**own["training"])
        if training is None
        else _changed("training", training, own["training"]),
    )


def _as_text(value: Any) -> Any:
    """Paths as their texts, in a list too."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_as_text(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _lora_of(fields: dict[str, Any], init_from: Any) -> LoraConfig:
    """What to adapt: as it is given, or as the adapter was saved that the job goes on with."""
    if init_from:
        from minilora.job.start import config_of  # reads files with torch; a job without one needs neither

        return config_of(init_from, fields)
    start = fields.get("init_lora_weights")
    if start in FROM_DATA:
        fields.setdefault(f"{start}_config", {})
    usual = _LORA | (
        {"target_modules": None} if fields.get("target_parameters") else {}
    )  # who names experts means these
    return LoraConfig(**usual | fields)


def _changed(name: str, config: Any, fields: Mapping[str, Any]) -> Any:
    """The config with these fields changed; a job looks at what it is."""
    return dataclasses.replace(config, **fields) if fields and isinstance(config, _PARTS[name]) else config

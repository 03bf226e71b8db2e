"""A grid in words, as trials: ``lr=3e-4,1e-3 r=4,16`` is every combination of the values. Next file: ``lab/sweeps/trial.py``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from minilora.errors import ConfigError, nearest
from minilora.job.settings import FROM_DATA
from minilora.lab.sweeps.trial import Trial
from minilora.lora.adapter import VARIANTS
from minilora.lora.config import LoraConfig
from minilora.training.settings import TrainConfig

__all__ = ["axes_of", "trials_of"]

_LORA = {field.name for field in dataclasses.fields(LoraConfig)}
_TRAIN = {field.name for field in dataclasses.fields(TrainConfig)}
_WORDS = {"true": True, "false": False, "none": None}
_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")  # "+" stands between names
_DICTIONARIES = {field.name for field in dataclasses.fields(LoraConfig) if "dict" in str(field.type)}
_MOST = 1000


def trials_of(
    grid: str,
    seeds: int | Sequence[int] = 1,
    lora: LoraConfig | None = None,
    train: TrainConfig | None = None,
    variant: str | None = None,
) -> list[Trial]:
    """Every combination of a grid's values, for every seed, once: full fine-tuning has no rank, so it comes once for all of them.

    Args:
        grid: fields of ``LoraConfig`` and ``TrainConfig`` with values, ``name=a,b,c``, with blanks between them; also ``variant``, whose
            values are registered variants and "full". ``+`` joins names of modules: ``target_modules=q_proj+v_proj,all-linear``.
        seeds: how many (0, 1, ...), or which. lora, train: what the grid does not say; by default all linear layers.
        variant: of the trials, where the grid has no ``variant``; None is the one that ``lora`` means.

    Raises:
        ConfigError: a name or a value that is not known, a name that stands twice, or more than 1,000 trials.
    """
    axes = axes_of(grid)
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise ConfigError(f"seeds={seeds!r}: wanted a number >= 1, or seeds that differ")
    if "seed" not in axes:
        axes["seed"] = chosen
    elif len(chosen) > 1:
        raise ConfigError(f"seed={axes['seed']} stands in the grid, and seeds={seeds!r} beside it; give one of them")
    count = 1
    for values in axes.values():
        count *= len(values)
    if count > _MOST:
        raise ConfigError(f"the grid has {count} trials; wanted {_MOST} at most")
    base, plan = lora or LoraConfig(target_modules="all-linear"), train or TrainConfig()
    usual = {"variant": variant} if variant else {}
    made = (
        _trial(usual | dict(zip(axes, values, strict=True)), base, plan) for values in itertools.product(*axes.values())
    )
    return list({repr(trial): trial for trial in made}.values())


def axes_of(grid: str) -> dict[str, list[Any]]:
    """The values of a grid by name, as ``trials_of`` reads it. Raises ``ConfigError``."""
    axes: dict[str, list[Any]] = {}
    for word in grid.split():
        name, equals, values = word.partition("=")
        if not equals or not values:
            raise ConfigError(f"grid: {word!r} has no value; wanted name=value,value, such as lr=3e-4,1e-3")
        if name not in _LORA | _TRAIN | {"variant"}:
            raise ConfigError(
                f"grid: {name!r} is no setting; the closest are {nearest(name, _LORA | _TRAIN | {'variant'})}"
            )
        if name in axes:
            raise ConfigError(f"grid: {name} stands there twice; write its values behind one another: {name}=a,b")
        axes[name] = [_value(name, text) for text in values.split(",")]
    return axes


def _value(name: str, text: str) -> Any:
    """A value as its field has it: a number, a word, a list of modules."""
    if name == "variant":
        if text != "full" and text not in VARIANTS:
            known = f"full, {', '.join(sorted(VARIANTS))}"
            close = nearest(text, VARIANTS)
            raise ConfigError(f"grid: variant={text!r} is not registered; known are {known}; the closest are {close}")
        return text
    if name in _DICTIONARIES:
        raise ConfigError(
            f"grid: {name} holds keys and values, which a grid cannot write; give it as a flag, for all trials"
        )
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if name == "layers_to_transform":
        return [_value("", layer) for layer in text.split("+")]
    if name in _NAMES and (name not in ("target_modules", "exclude_modules") or "+" in text):
        return text.split("+")
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if name in ("target_modules", "exclude_modules") and text != "all-linear":
        return [text]
    return text


def _trial(values: dict[str, Any], lora: LoraConfig, train: TrainConfig) -> Trial:
    """Raises ``ConfigError`` with the trial's settings before the reason."""
    kind, start = values.pop("variant", None), values.get("init_lora_weights")
    if start in FROM_DATA and getattr(lora, f"{start}_config") is None:
        values[f"{start}_config"] = {}  # as in a job
    try:
        of_lora = {name: value for name, value in values.items() if name in _LORA}
        plan = dataclasses.replace(train, **{name: value for name, value in values.items() if name in _TRAIN})
        if kind == "full":
            return Trial(None, plan)
        return Trial(dataclasses.replace(lora, **of_lora), plan, kind)
    except TypeError as error:
        raise ConfigError(f"grid: {error}") from None

"""The adapter that a job begins with: a fresh one, one that starts from the data (EVA, CorDA, LoRA-GA), or one that was saved.

Next file: ``job/outcome.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from minilora.data.batches import collate
from minilora.data.encoding import Encoded
from minilora.errors import ConfigError
from minilora.files.validate import shown
from minilora.job.settings import FROM_DATA, Job
from minilora.lora.adapter import variant
from minilora.lora.config import LoraConfig
from minilora.lora.inject import inject
from minilora.lora.named import as_named
from minilora.lora.variants.corda import preprocess_corda
from minilora.lora.variants.lora_ga import preprocess_loraga
from minilora.many.eva import initialize_lora_eva_weights
from minilora.store.adapter_files import Stored, read_adapter, read_config, refuse_regexes
from minilora.store.load import load_adapter
from minilora.training.losses import token_losses
from minilora.training.processes import Processes
from minilora.training.settings import TrainConfig
from minilora.training.sharding import in_turn

__all__ = ["begin", "begin_new", "config_of", "saved_start"]

_ABOUT = ("base_model_name_or_path", "inference_mode", "revision", "task_type")  # these change no number


def config_of(folder: str, given: Mapping[str, Any]) -> LoraConfig:
    """The config of the adapter in a folder. Raises ``ConfigError`` for a field that is given otherwise than it was saved."""
    config = read_config(folder)
    asked = LoraConfig(**given)
    _refuse_other(folder, config, {name: getattr(asked, name) for name in given})
    return config


def _refuse_other(folder: str, config: LoraConfig, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if (own := getattr(config, name)) != value and name not in _ABOUT:
            raise ConfigError(
                f"{name}={shown(value)}: the adapter in {folder} has {shown(own)}, and goes on as it is; leave {name} out, or begin "
                "without init_from"
            )


def saved_start(job: Job, processes: Processes) -> tuple[Job, Stored | None]:
    """The job with the config of the adapter that it goes on from, and that adapter; None for a fresh start.

    Raises:
        ConfigError: the job asks for another config or variant than the adapter has, or keeps its model in parts. CheckpointError,
            ConfigError: as ``read_adapter``.
    """
    shared_out = job.shard and processes.size > 1
    if shared_out and job.dry_run:
        raise ConfigError("dry_run: tries its first batch with the whole model; leave shard out")
    if job.lora.init_lora_weights in FROM_DATA and shared_out and not job.init_from:
        raise ConfigError(
            f"shard: init_lora_weights={job.lora.init_lora_weights!r} looks at the data with the whole model; leave shard out"
        )
    if job.variant:
        variant(job.variant)  # one that is not known shows now
        if not job.init_from:
            as_named(job.lora, job.variant)
    if not job.init_from:
        return job, None
    if shared_out:
        raise ConfigError("shard: an adapter that was saved goes into a whole model; leave shard or init_from out")
    if Path(job.init_from).resolve().is_relative_to(Path(job.out).resolve()):
        raise ConfigError(
            f"init_from={shown(job.init_from)}: lies in {job.out}, where this run is written; go on with a run by --resume, or name "
            "another out"
        )
    stored = read_adapter(job.init_from)
    refuse_regexes(stored)
    if job.variant not in ("", stored.variant):
        raise ConfigError(
            f"variant={job.variant!r}: the adapter in {job.init_from} is {stored.variant!r}; leave variant out"
        )
    if job.lora != _default():
        _refuse_other(job.init_from, stored.config, vars_of(job.lora))
    return dataclasses.replace(job, lora=stored.config), stored


def vars_of(config: LoraConfig) -> dict[str, Any]:
    """The fields of a config by name."""
    return {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config)}


def _default() -> LoraConfig:
    made: Any = next(entry for entry in dataclasses.fields(Job) if entry.name == "lora").default_factory
    return made()


def begin(
    job: Job, model: Any, stored: Stored | None, examples: Sequence[Encoded], pad_id: int, say: Callable[[str], None]
) -> None:
    """Put the adapter into the model. A seed means the same adapter, whatever ran before it.

    Raises:
        CheckpointError: the saved one is of another base model, or is not what was read before. TargetError, StateError: as ``inject``.
    """
    if stored is not None:
        options = {"expect_sha256": stored.sha256, "allow_other_base": job.allow_other_base}
        load_adapter(model, job.init_from, is_trainable=True, **options)  # type: ignore[arg-type]
        say(f"goes on from the adapter in {job.init_from}")
        return
    start, train = job.lora.init_lora_weights, job.training
    if start in FROM_DATA:
        say(f"{start} looks at {min(job.start_examples, len(examples))} examples for its start")
    begin_new(model, job.lora, train, job.variant or None, examples, pad_id, job.start_examples)


def begin_new(
    model: Any,
    config: LoraConfig,
    train: TrainConfig,
    variant: str | None,
    examples: Sequence[Encoded],
    pad_id: int,
    count: int,
) -> None:
    """A new adapter; one that starts from the data looks at the first ``count`` examples. Raises as ``inject``."""
    config = as_named(config, variant)
    start = config.init_lora_weights
    batches = _batches(model, train.batch_size, examples, pad_id, count) if start in FROM_DATA else []
    torch.manual_seed(train.seed)
    if start == "corda":
        preprocess_corda(model, config, lambda: _forward(model, batches))
    elif start == "lora_ga":
        preprocess_loraga(model, config, lambda: _backward(model, batches))
    torch.manual_seed(train.seed)
    with in_turn(model) as around:
        inject(model, config, variant=variant, around=around)
    if start == "eva":
        initialize_lora_eva_weights(model, batches, gather_distributed_inputs=False, show_progress_bar=False)


def _batches(model: Any, batch_size: int, examples: Sequence[Encoded], pad_id: int, count: int) -> list[dict[str, Any]]:
    """The first examples to learn from, as the model is called with them; none of the batches is smaller than a micro-batch."""
    device, count = next(model.parameters()).device, min(count, len(examples))
    pieces = max(1, count // batch_size)
    cuts = [count * number // pieces for number in range(pieces + 1)]
    made = [collate([examples[at] for at in range(*cut)], pad_id) for cut in pairwise(cuts)]
    return [{name: value.to(device) for name, value in batch.items()} for batch in made]


@torch.no_grad()
def _forward(model: Any, batches: Sequence[dict[str, Any]]) -> None:
    for batch in batches:
        model(**batch)


def _backward(model: Any, batches: Sequence[dict[str, Any]]) -> None:
    for batch in batches:
        token_losses(model, batch).mean().backward()

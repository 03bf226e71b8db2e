"""``minilora train``: a fine-tuning job from flags, a TOML file, or both."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.jobs import run_job
from minilora.cli.toml import ONE_OR_SEVERAL, REGEX_FLAGS, read_toml
from minilora.errors import ConfigError
from minilora.hf.places import DTYPE_CHOICES, QUANT_CHOICES
from minilora.job.settings import Job
from minilora.lora.config import LoraConfig
from minilora.training.schedule import OFFLOAD_CHOICES, OPTIMIZERS, PACK_CHOICES, TrainConfig

USAGE = "--model NAME --data FILE --out FOLDER [options]"
EXAMPLES = """\
  minilora train --model smollm2 --data chats.jsonl --out runs/mine --steps 200 --prompts "How is the weather?"
  minilora train --model ./llama --data chats.jsonl --out runs/long --batch-size 1 --accumulate 16 --save-every 50 --resume
  minilora train --model smollm2 --data chats.jsonl books.parquet:0.5 --eval-data held.csv --out runs/both
  minilora train --config job.toml --lr 2e-4"""

_LORA_FLAGS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "bias",
    "use_rslora",
    "modules_to_save",
)
# What is in no other group is "training".
_GROUPS = {
    "model": ("model", "quant", "double_quant", "device", "dtype", "attention", "shard", "trust_remote_code"),
    "data": ("data", "eval_data", "eval_share", "columns", "system", "max_length", "truncate", "date"),
    "adapter": _LORA_FLAGS,
    "output": ("out", "resume", "overwrite", "save_every", "keep_checkpoints", "prompts", "max_new_tokens"),
}
_CHOICES = {
    "quant": QUANT_CHOICES,
    "dtype": DTYPE_CHOICES,
    "optimizer": OPTIMIZERS,
    "pack": PACK_CHOICES,
    "offload": OFFLOAD_CHOICES,
}


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora train`` takes."""
    config = "TOML file with flags as keys (lora_alpha = 16); a flag on the command line wins"
    add_flags(parser, "options", [Flag("config", str, None, config)])
    every = settings()
    grouped = {name for names in _GROUPS.values() for name in names}
    training = tuple(name for name in every if name not in grouped)
    for group in ("model", "data", "adapter", "training", "output"):
        names = _GROUPS.get(group, training)
        add_flags(parser, group, [every[name] for name in names], unset=True)


def settings() -> dict[str, Flag]:
    """Every setting of a job by name, read from the dataclasses."""
    lora = fields_of(LoraConfig, _LORA_FLAGS, target_modules="all-linear")
    every = fields_of(Job) | lora | fields_of(TrainConfig)
    return every | {name: dataclasses.replace(every[name], choices=words) for name, words in _CHOICES.items()}


def run(arguments: argparse.Namespace) -> None:
    """Fine-tune, and say what came of it."""
    run_job(job_of(arguments))


def job_of(arguments: argparse.Namespace) -> Job:
    """The job that the flags and the TOML file ask for. Raises ``ConfigError`` for a value that cannot be meant, by name."""
    known = {name: flag.kind for name, flag in settings().items()}
    given = read_toml(arguments.config, known) if arguments.config else {}
    if given.get("trust_remote_code"):
        raise ConfigError(
            f"{arguments.config}: trust_remote_code: a file may not let code run; give --trust-remote-code on the command line"
        )
    given |= {name: value for name in known if (value := getattr(arguments, name)) is not None}
    for name in ("model", "data", "out"):
        if not given.get(name):
            raise ConfigError(f'--{name} is missing; give it as a flag or as {name} = "..." in the TOML file')
    for name in ONE_OR_SEVERAL:
        if isinstance(value := given.get(name), list) and len(value) == 1:
            given[name] = value[0]
    for name in REGEX_FLAGS:
        if isinstance(value := given.get(name), list) and len(value) == 1:
            given[name] = value[0] if value[0] == "all-linear" or not value[0].replace("_", "").isalnum() else value
    alpha = given.get("lora_alpha")
    if isinstance(alpha, float) and alpha.is_integer():
        given["lora_alpha"] = int(alpha)
    lora: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora |= {name: given.pop(name) for name in _LORA_FLAGS if name in given}
    training = {entry.name: given.pop(entry.name) for entry in dataclasses.fields(TrainConfig) if entry.name in given}
    return Job(**given, lora=LoraConfig(**lora), training=TrainConfig(**training))

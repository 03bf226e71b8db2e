"""``minilora train``: a fine-tuning job from flags, a TOML file, or both."""

from __future__ import annotations

import argparse
import dataclasses

from minilora.cli.flags import Flag, add_flags, fields_of, flag_of
from minilora.cli.jobs import run_job
from minilora.cli.toml import REGEX_FLAGS, read_toml
from minilora.errors import ConfigError
from minilora.hf.places import DTYPE_CHOICES, QUANT_CHOICES
from minilora.job.given import job_from
from minilora.job.settings import Job
from minilora.lora.config import LoraConfig
from minilora.training.schedule import OFFLOAD_CHOICES, OPTIMIZERS, PACK_CHOICES, TrainConfig

USAGE = "--model NAME --data FILE --out FOLDER [options]"
EXAMPLES = """\
  minilora train --model smollm2 --data chats.jsonl --out runs/mine --steps 200 --prompts "How is the weather?"
  minilora train --model ./llama --data chats.jsonl --out runs/long --batch-size 1 --accumulate 16 --save-every 50 --resume
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
FLAG_ALONE = ("trust_remote_code",)  # what no file may say
# What is in no other group is "training".
_GROUPS = {
    "model": ("model", "quant", "double_quant", "device", "dtype", "attention", "shard", "trust_remote_code"),
    "data": ("data", "max_length", "eval_share", "date"),
    "adapter": _LORA_FLAGS,
    "output": (
        "out",
        "resume",
        "overwrite",
        "save_every",
        "keep_checkpoints",
        "prompts",
        "max_new_tokens",
        "push_to_hub",
        "private",
    ),
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
    for name in FLAG_ALONE:
        if given.get(name):
            raise ConfigError(
                f"{arguments.config}: {name}: a file may not let code run; give {flag_of(name)} on the command line"
            )
    given |= {name: value for name in known if (value := getattr(arguments, name)) is not None}
    for name in ("model", "data", "out"):
        if not given.get(name):
            raise ConfigError(f'--{name} is missing; give it as a flag or as {name} = "..." in the TOML file')
    for name in REGEX_FLAGS:
        if isinstance(value := given.get(name), list) and len(value) == 1:
            given[name] = value[0] if value[0] == "all-linear" or not value[0].replace("_", "").isalnum() else value
    alpha = given.get("lora_alpha")
    if isinstance(alpha, float) and alpha.is_integer():
        given["lora_alpha"] = int(alpha)
    return job_from(given)

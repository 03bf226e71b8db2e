"""Every setting of a job as a flag: read from the dataclasses, put into groups, or named here with the reason why it is none.

So a field that is added becomes a flag by itself. ``tests/cli/test_help.py`` asks that each is here or there.
"""

from __future__ import annotations

import dataclasses

from minilora.cli.flags import Flag, fields_of
from minilora.hf.places import DTYPE_CHOICES, QUANT_CHOICES
from minilora.job.settings import Job
from minilora.lora.config import BIAS_CHOICES, LoraConfig
from minilora.training.settings import OFFLOAD_CHOICES, OPTIMIZERS, PACK_CHOICES, SCHEDULES, TrainConfig

__all__ = ["FLAG_ALONE", "GROUPS", "LORA_FLAGS", "NO_FLAGS", "groups", "settings"]

# Fields of LoraConfig that are no flags, and why.
NO_FLAGS = {
    "fan_in_fan_out": "the orientation of a weight is read from its layer",
    "layer_replication": "minilora has none",
    "task_type": "a job trains a causal language model",
    "base_model_name_or_path": "says in the file what --model is",
    "revision": "says in the file what --model is",
    "inference_mode": "says in the file whether an adapter was saved",
}
FLAG_ALONE = ("trust_remote_code",)  # what no file may say
LORA_FLAGS = tuple(entry.name for entry in dataclasses.fields(LoraConfig) if entry.name not in NO_FLAGS)
_FIRST = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "init_lora_weights",
    "use_dora",
    "use_rslora",
)
_BESIDE = ("variant", "init_from", "allow_other_base", "start_examples")
# What is in no other group is "training".
GROUPS = {
    "model": ("model", "quant", "double_quant", "device", "dtype", "attention", "trust_remote_code"),
    "data": ("data", "eval_data", "eval_share", "columns", "system", "max_length", "truncate", "date"),
    "adapter": (*_FIRST, *(name for name in LORA_FLAGS if name not in _FIRST), *_BESIDE),
    "training": ("steps", "epochs", "batch_size", "accumulate", "lr", "schedule", "warmup", "decay", "min_lr_ratio", "optimizer"),
    "evaluation": ("eval_every", "patience", "min_delta", "keep_best", "prompts", "max_new_tokens"),
    "speed and memory": ("pack", "gradient_checkpointing", "offload", "compile", "shard", "threads", "profile"),
    "output": ("out", "resume", "overwrite", "save_every", "keep_checkpoints", "report_to", "dry_run", "push_to_hub", "private", "probe"),
}  # fmt: skip
_CHOICES = {
    "quant": QUANT_CHOICES,
    "dtype": DTYPE_CHOICES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "pack": PACK_CHOICES,
    "offload": OFFLOAD_CHOICES,
    "bias": BIAS_CHOICES,
}


def settings() -> dict[str, Flag]:
    """Every setting of a job by name, read from the dataclasses."""
    every = fields_of(Job) | fields_of(LoraConfig, LORA_FLAGS, target_modules="all-linear") | fields_of(TrainConfig)
    return every | {name: dataclasses.replace(every[name], choices=words) for name, words in _CHOICES.items()}


def groups() -> dict[str, list[Flag]]:
    """The flags of ``minilora train`` by group, in the order of the help."""
    every = settings()
    grouped = {name for names in GROUPS.values() for name in names}
    rest = tuple(name for name in every if name not in grouped)
    return {
        group: [every[name] for name in (*names, *(rest if group == "training" else ()))]
        for group, names in GROUPS.items()
    }

"""Words of other programs: those that mean exactly a flag of ours are taken, and others have the nearest of ours named.

The one table of names is here. Next file: ``cli/parser.py``.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from minilora.cli.say import say
from minilora.errors import ConfigError, nearest

__all__ = ["Ours", "closest", "in_our_words", "meant", "note"]

# What PEFT, transformers' Trainer, LLaMA-Factory, axolotl, torchtune, mlx-lm and llama.cpp call it: what it is called here, exactly.
_SYNONYMS = {
    "learning-rate": "lr", "rank": "r", "lora-r": "r", "lora-rank": "r", "alpha": "lora-alpha", "dropout": "lora-dropout",
    "lora-target": "target-modules", "lora-target-modules": "target-modules", "lora-modules-to-save": "modules-to-save",
    "num-train-epochs": "epochs", "num-epochs": "epochs", "max-steps": "steps", "iters": "steps",
    "micro-batch-size": "batch-size", "per-device-train-batch-size": "batch-size", "train-batch-size": "batch-size",
    "gradient-accumulation-steps": "accumulate", "grad-accumulation-steps": "accumulate",
    "warmup-ratio": "warmup", "warmup-steps": "warmup", "lr-scheduler": "schedule", "lr-scheduler-type": "schedule",
    "min-lr-rate": "min-lr-ratio", "cosine-min-lr-ratio": "min-lr-ratio", "optim": "optimizer", "max-grad-norm": "clip",
    "gradient-clipping": "clip", "eval-steps": "eval-every", "steps-per-eval": "eval-every",
    "early-stopping-patience": "patience", "early-stopping-threshold": "min-delta", "load-best-model-at-end": "keep-best",
    "val-set-size": "eval-share", "val-size": "eval-share", "save-steps": "save-every", "save-total-limit": "keep-checkpoints",
    "overwrite-output-dir": "overwrite", "base-model": "model", "model-name-or-path": "model", "model-name": "model",
    "torch-dtype": "dtype", "attn-implementation": "attention", "dataset": "data", "dataset-path": "data",
    "train-file": "data", "max-seq-length": "max-length", "max-seq-len": "max-length", "sequence-len": "max-length",
    "cutoff-len": "max-length", "output": "out", "output-dir": "out", "save-path": "out", "adapter-path": "adapter",
    "adapter-name-or-path": "adapter", "max-tokens": "max-new-tokens", "temp": "temperature",
    "hub-model-id": "push-to-hub", "hub-private-repo": "private",
    "eval-dataset": "eval-data", "eval-file": "eval-data", "validation-file": "eval-data", "test-datasets": "eval-data",
    "default-system": "system", "system-prompt": "system",
}  # fmt: skip
# Switches of others that are a value here.
_SWITCHES = {
    "bf16": ("dtype", "bfloat16"), "fp16": ("dtype", "float16"), "load-in-4bit": ("quant", "nf4"),
    "load-in-8bit": ("quant", "int8"),
}  # fmt: skip
# Words that are near, and do not mean the same.
_NEAR = {
    "packing": "pack", "sample-packing": "pack", "resume-from-checkpoint": "resume", "bits": "quant", "flash-attn": "attention",
    "qlora": "quant",
    "finetune": "train", "fine-tune": "train", "ask": "generate", "talk": "chat", "pack": "quantize", "fuse": "merge",
    "convert": "export", "upload": "push", "memory": "plan", "benchmark": "bench", "claims": "lab", "reproduce": "lab",
    "course": "learn", "exercise": "learn",
    "diff": "compare", "epochs": "steps",
    "num-train-epochs": "steps",
}  # fmt: skip


class Ours(NamedTuple):
    """A flag of ours that is meant, and its value where the other program's switch is one."""

    name: str
    value: str | None


def meant(word: str, known: Collection[str]) -> Ours | None:
    """The known flag or key that this one of another program means exactly, or None. Dashes and underscores mean the same.

    Args:
        word: without a value. known: flags as they are written, or keys of TOML.
    """
    own = {_bare(name): name for name in known}
    bare = _bare(word)
    if bare in own:
        return Ours(own[bare], None)
    if (name := _SYNONYMS.get(bare, "")) in own:
        return Ours(own[name], None)
    name, value = _SWITCHES.get(bare, ("", None))
    return Ours(own[name], value) if name in own else None


def note(word: str, ours: Ours, given: Collection[str]) -> None:
    """Say on standard error what a word is here; the first process alone does. ``given``: what is given under our names.

    Raises:
        ConfigError: the same setting is given under its name here as well.
    """
    if ours.name in given:
        raise ConfigError(f"{word} and {ours.name} are one setting here; give one of them")
    if os.environ.get("RANK", "0") in ("0", ""):
        value = "" if ours.value is None else f" {ours.value}" if ours.name.startswith("-") else f" = {ours.value!r}"
        say(f"{word} is {ours.name}{value} here", error=True)


def in_our_words(words: Sequence[str], known: Collection[str]) -> list[str]:
    """The words of a command line with flags of other programs replaced by the ``known`` one that each means, which is noted.

    ``true`` and ``false`` after a switch, ours too, are as ``--name`` and ``--no-name``.

    Raises:
        ConfigError: as ``note``, or a switch of others is turned off that is a value here.
    """
    end = words.index("--") if "--" in words else len(words)
    given = {word.partition("=")[0] for word in words[:end]} & set(known)
    found: list[str] = []
    rest = iter(range(end))
    for at in rest:
        flag, equals, value = words[at].partition("=")
        own = Ours(flag, None) if flag in known and f"--no-{flag[2:]}" in known else None
        ours = own or (meant(flag, known) if flag.startswith("--") and flag not in known else None)
        if ours is None:
            found.append(words[at])
            continue
        if ours is not own:
            note(flag, ours, given)
        given.add(ours.name)
        twin = f"--no-{ours.name[2:]}"
        if ours.value is None and twin not in known:
            found.append(f"{ours.name}{equals}{value}")
            continue
        if not equals and at + 1 < end and words[at + 1].lower() in ("true", "false"):  # as transformers has it
            value = words[next(rest)]
        off = value.lower() == "false"
        if value.lower() not in ("", "true", "false") or (off and ours.value is not None):
            if ours is own:  # which the parser refuses
                found.append(words[at])
                continue
            raise ConfigError(
                f"{flag} {value}: it is {ours.name} {ours.value or ''} here; leave it out, or give {ours.name}"
            )
        found += [twin if off else ours.name] if ours.value is None else [ours.name, ours.value]
    return found + list(words[end:])


def closest(word: str, known: Iterable[str]) -> str:
    """As ``errors.nearest``, and ``--lerning-rate`` is close to ``--lr``."""
    names = list(known)
    own = {_bare(name): name for name in names}
    tables = (_NEAR, _SYNONYMS, {other: name for other, (name, _) in _SWITCHES.items()})
    others = {other: own[name] for table in tables for other, name in table.items() if name in own and other not in own}
    best = difflib.get_close_matches(_bare(word[:100]), [*own, *others], n=1, cutoff=0.75)
    return repr(others[best[0]]) if best and best[0] in others else nearest(word, names)


def _bare(name: str) -> str:
    """Flags, keys in TOML and commands in one form."""
    return name.lstrip("-").replace("_", "-")

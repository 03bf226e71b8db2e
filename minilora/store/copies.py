"""What ``modules_to_save`` of a file means on this model, where its tensors say more exactly than its names.

PEFT takes every module whose path ends in these letters, and so does minilora; it once took whole names only ("norm" was ``model.norm``).
PEFT names both heads that a classifier may have, of which a model has one or none, and ties a table only if it is called
"embed_tokens" or "lm_head". Next file: ``store/fill.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from minilora.lora.bare import Bare
from minilora.lora.match import HEADS_OF_PEFT
from minilora.lora.targets import ends_with
from minilora.lora.tying import twins_of
from minilora.store.adapter_files import PREFIX, Stored

__all__ = ["as_meant"]


def as_meant(stored: Stored, bare: Bare) -> Stored:
    """The adapter with a config that asks for the copies that its file has; itself where it does so already, or the config is the
    caller's.
    """
    names = stored.config.modules_to_save
    if not stored.from_file or not names:
        return stored
    modules = {path: module for path, module in bare.named_modules() if path}
    meant = [path for path in modules if any(path.endswith(name) for name in names)]
    there = _owners(stored)
    changes: dict[str, Any] = {}
    if stored.config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        used = [name for name in names if name not in HEADS_OF_PEFT or any(path.endswith(name) for path in meant)]
        changes["modules_to_save"] = tuple(used) or None
    narrow = [path for path in meant if any(ends_with(path, name) for name in names)]
    more = [path for path in meant if path not in set(narrow) and modules[path].state_dict()]
    if narrow and more and not there.intersection(more):
        changes["modules_to_save"] = tuple(narrow)
    if stored.config.ensure_weight_tying and _parted(bare, modules, meant, there):
        changes["ensure_weight_tying"] = False
    wanted = {name: value for name, value in changes.items() if value != getattr(stored.config, name)}
    return dataclasses.replace(stored, config=dataclasses.replace(stored.config, **wanted)) if wanted else stored


def _owners(stored: Stored) -> set[str]:
    """Every path that a tensor of the file lies in."""
    found: set[str] = set()
    for key in stored.tensors:
        path = key.removeprefix(PREFIX)
        while path := path.rpartition(".")[0]:
            if path in found:
                break
            found.add(path)
    return found


def _parted(bare: Bare, modules: dict[str, nn.Module], copied: list[str], there: set[str]) -> bool:
    """Whether the file has copies of modules and none of any module that is tied to them, which were then not tied."""
    twins = {twin for path in copied if path in there for twin in twins_of(bare, modules[path])} - set(copied)
    return bool(twins) and not there.intersection(twins)

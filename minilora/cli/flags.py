"""Flags as data: what each is called, takes, means and defaults to. Those of a config are read from its dataclass and its docstring.

So a help text stands once, beside the field, and a default can be no other than the field's.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from minilora.cli.kinds import GATHERED, Gather, Numbers, NumbersOrTable, Table, Word, word

__all__ = ["Flag", "add_flags", "fields_of", "flag_of"]

# What stands for a value in the help, where the kind of it (N, X, TEXT) would say too little.
_METAVARS = {
    "model": "NAME", "push_to_hub": "REPO", "target": "PROGRAM", "program": "PROGRAM", "bias": "WORD", "scale": "WORD",
    "expect_sha256": "DIGEST",
    "data": "FILE", "eval_data": "FILE", "columns": "NAME=FIELD", "config": "FILE", "calibration": "FILE", "html": "FILE",
    "forget": "FILE", "base": "FILE", "lora": "FILE", "workers": "N", "server": "URL", "key_variable": "VARIABLE",
    "device": "DEVICE", "date": "DAY", "attention": "WORD", "variant": "WORD", "layers_pattern": "NAME", "target_parameters": "NAME",
    "out": "FOLDER", "folder": "FOLDER", "adapter": "FOLDER", "init_from": "FOLDER",
    "target_modules": "LAYER", "exclude_modules": "LAYER", "modules_to_save": "MODULE",
    "report_to": "TRACKER",
}  # fmt: skip
_KINDS = {int: "N", float: "X", Numbers: "N", Table: "NAME=VALUE", NumbersOrTable: "N", Word: "WORD"}


_NONE = type(None)


@dataclass(frozen=True)
class Flag:
    """One flag.

    Args:
        name: the attribute of the parsed arguments, and the key in TOML.
        kind: bool, int, float, str, list for several texts, or one of ``cli/kinds.py``.
        default: what holds if the flag is not given.
        about: what it means, with its unit.
        choices: the words that it may be, for the help alone.
        required: whether there is no default.
        spelt: the flag as it is written, if not ``--name`` with dashes.
        otherwise: what holds if the flag is not given, in words, where no value says it.
        check: turns the text that was given into the value; None takes ``kind``.
        stands: for a value in the help, where the one of this name says too little.
    """

    name: str
    kind: type
    default: Any
    about: str
    choices: tuple[str, ...] = ()
    required: bool = False
    spelt: str = ""
    check: Any = None
    otherwise: str = ""
    stands: str = ""

    @property
    def flag(self) -> str:
        """As it is written on the command line."""
        return self.spelt or flag_of(self.name)

    @property
    def help(self) -> str:
        """The text with choices and default."""
        said = str(self.default).lower() if self.kind is Word else _shown(self.default)
        default = "required" if self.required else f"default: {self.otherwise or said}"
        choices = f"{', '.join(self.choices)}; " if self.choices else ""
        return f"{self.about} ({choices}{default})".replace("%", "%%")


def flag_of(name: str) -> str:
    """``lora_alpha`` to ``--lora-alpha``."""
    return "--" + name.replace("_", "-")


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, (list, tuple)):
        return " ".join(default) or "none"
    return "none" if default is None or default == {} else str(default) or '""'


def add_flags(parser: argparse.ArgumentParser, group: str, flags: Iterable[Flag], unset: bool = False) -> None:
    """Put flags into the group of this name (model, data, adapter, training, generation, output) of a command.

    Args:
        unset: what is not given is None and not the default, and nothing is missing: a file may have it.
    """
    titled = next((known for known in parser._action_groups if known.title == group), None)
    target = titled or parser.add_argument_group(group)
    for flag in flags:
        options: dict[str, Any] = {"dest": flag.name, "default": None if unset else flag.default}
        if flag.kind is bool:
            options |= {"action": argparse.BooleanOptionalAction}
        else:
            metavar = (
                flag.stands or _METAVARS.get(flag.name) or ("WORD" if flag.choices else _KINDS.get(flag.kind, "TEXT"))
            )
            options |= {"metavar": metavar, "required": flag.required and not unset}
            if flag.kind in GATHERED:
                options |= {"nargs": "+", "action": Gather, "kind": flag.kind}
            elif flag.kind is list:
                options |= {"nargs": "+"}
            else:
                options |= {"type": flag.check or (word if flag.kind is Word else flag.kind)}
        action = target.add_argument(flag.flag, **options)
        action.help = flag.help  # not before: some versions of argparse would add the default of a switch to it


def fields_of(cls: type, names: Iterable[str] | None = None, **changed: Any) -> dict[str, Flag]:
    """The fields of a dataclass as flags by name, with the texts of its docstring.

    Args:
        names: those that are wanted, in this order; None for all whose values the command line can give.
        changed: defaults that the command line has instead.
    """
    hints, abouts = get_type_hints(cls), _abouts(cls)
    flags = {}
    for entry in dataclasses.fields(cls):
        kind = _kind_of(hints[entry.name])
        made = entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
        default = changed.get(entry.name, made)
        required = default is dataclasses.MISSING
        if kind is not None:
            about = abouts.get(entry.name, "")
            flags[entry.name] = Flag(entry.name, kind, None if required else default, about, required=required)
    return flags if names is None else {name: flags[name] for name in names}


def _kind_of(hint: Any) -> type | None:
    """How a field is given, by its type; None for what is no flag: a config of its own, or what may be nothing but None."""
    kinds = [kind for kind in (get_args(hint) if isinstance(hint, types.UnionType) else (hint,)) if kind is not _NONE]
    whole = any(get_origin(kind) is not dict and get_args(kind) == (int,) for kind in kinds)
    if any(get_origin(kind) is dict for kind in kinds):
        return NumbersOrTable if whole else Table
    if any(dataclasses.is_dataclass(kind) for kind in kinds):
        return Table if isinstance(hint, types.UnionType) else None
    if whole:
        return Numbers
    if not kinds or {bool, str} <= set(kinds):
        return Word if kinds else None
    return next((kind for kind in (bool, float, int) if kind in kinds), str if kinds == [str] else list)


_ENTRY = re.compile(r"^ {8}(\w+(?:, \w+)*): (.+(?:\n {9,}\S.*)*)", re.M)


def _abouts(cls: type) -> dict[str, str]:
    """What the ``Args`` of a dataclass and of those under it say of each field (nothing under ``python -OO``, which drops docstrings)."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        text = (part.__doc__ or "").partition("Args:")[2].partition("\n\n")[0]
        for names, about in _ENTRY.findall(text):
            found |= dict.fromkeys(names.split(", "), about)
    return {name: _plain(about, found) for name, about in found.items()}


def _plain(about: str, fields: Iterable[str]) -> str:
    """A text of a docstring as one line for a terminal; a field named in it becomes the flag."""
    known = set(fields)

    def replace(quoted: re.Match[str]) -> str:
        return flag_of(quoted[1]) if quoted[1] in known else quoted[1]

    return re.sub(r"``(.+?)``", replace, " ".join(about.split())).removesuffix(".")

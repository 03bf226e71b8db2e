"""The settings of a job as a TOML file to be edited: every flag of ``minilora train`` with its text, at its default and commented out.

All of it is read from the flags, so a flag that is added or changed is in the next file.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from minilora.cli import settings, train
from minilora.cli.flags import Flag
from minilora.cli.kinds import EXAMPLES
from minilora.cli.parser import Parser

__all__ = ["settings_file"]

_WIDTH = 100
_HEAD = """\
Settings of a fine-tuning job, for minilora train --config FILE. A flag on the command line wins over this file, and paths are taken from
where the command is run. A setting that begins with # is at its default, or not set: take the # away and change it."""


def settings_file(chosen: Mapping[str, Any]) -> str:
    """The file, with the ``chosen`` settings in force."""
    parser = Parser("minilora train", "")
    train.flags(parser)
    every, lines = settings.settings(), [_comment(_HEAD)]
    for group in parser._action_groups:
        names = [action.dest for action in group._group_actions if action.dest in every]
        names = [name for name in names if name not in settings.FLAG_ALONE]
        if names:
            lines.append(f"\n# ---- {group.title} ----\n")
            lines += [_entry(every[name], chosen) for name in names]
    return "\n".join(lines)


def _entry(flag: Flag, chosen: Mapping[str, Any]) -> str:
    about = _comment(flag.about + (f" ({', '.join(flag.choices)})" if flag.choices else ""))
    if flag.name in chosen:
        return f"{about}\n{flag.name} = {_value(chosen[flag.name])}\n"
    unset = flag.default is None
    shown = EXAMPLES[flag.kind] if unset else flag.default
    return f"{about}\n#{flag.name} = {_value(shown)}{'  # not set' if unset else ''}\n"


def _comment(text: str) -> str:
    whole = " ".join(text.split())
    return textwrap.fill(whole, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _value(value: Any) -> str:
    """As TOML writes it, which is as JSON does for all but tables."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(name)} = {_value(own)}' for name, own in value.items())}}}"
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)

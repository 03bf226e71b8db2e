"""Settings of a job as they were given, by flags, in a TOML file, or both, in the form that a job takes. Next file: ``cli/jobs.py``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from minilora.cli.flags import flag_of
from minilora.cli.settings import FLAG_ALONE
from minilora.cli.toml import ONE_OR_SEVERAL, REGEX_FLAGS, read_toml
from minilora.errors import ConfigError

__all__ = ["given_of"]


def given_of(
    arguments: argparse.Namespace, known: Mapping[str, type], needed: Sequence[str] = ("model", "data", "out")
) -> dict[str, Any]:
    """What is given by name; a flag wins over the file of ``--config``.

    Args:
        known: the kind of each setting. needed: what must be given.

    Raises:
        ConfigError: one that is needed is missing, or what the file says cannot be meant, by name.
    """
    given = read_toml(arguments.config, dict(known)) if arguments.config else {}
    for name in FLAG_ALONE:
        if given.get(name):
            raise ConfigError(
                f"{arguments.config}: {name}: a file may not let code run; give {flag_of(name)} on the command line"
            )
    flags = {name: value for name in known if (value := getattr(arguments, name)) is not None}
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in flags and other not in flags:  # the command line says how long the run is, whatever the file says
            given.pop(other, None)
    given |= flags
    for name in needed:
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
    return given

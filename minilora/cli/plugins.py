"""``--plugin``: a file of the user's own that registers variants of LoRA and codebooks. It is run because it was named with the flag.

No settings file may name one. What is registered is known by its name: ``--variant gated``, ``--quant mine``, a folder of that variant.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from minilora.cli.flags import Flag
from minilora.cli.say import say
from minilora.errors import ConfigError

__all__ = ["add_plugin_flag", "load_plugins"]


def add_plugin_flag(parser: argparse.ArgumentParser) -> None:
    """Give a command ``--plugin``, which takes one file and may come several times: a prompt may stand behind it."""
    about = "Python file of your own, run with all your rights; what it registers (variants, codebooks) is known by its name"
    group = next(group for group in parser._action_groups if group.title == "options")
    action = group.add_argument("--plugin", action="append", metavar="FILE")
    action.help = Flag("plugin", str, None, about).help


def load_plugins(files: Sequence[str]) -> None:
    """Run these files, one after the other, and say what each has registered.

    Raises:
        ConfigError: there is no such file of Python, or it fails; with the file and the line.
    """
    import minilora.lora.variants  # noqa: F401  so that our variants have their names first
    from minilora.lora.adapter import registered
    from minilora.quant.codebooks import CODEBOOKS

    for file in files:
        variants, books = registered(), dict(CODEBOOKS)
        _run(file)
        new = [f"variant {name!r}" for name in registered() if registered()[name] is not variants.get(name)]
        new += [f"codebook {name!r}" for name, book in CODEBOOKS.items() if book != books.get(name)]
        if os.environ.get("RANK", "0") in ("0", ""):
            say(f"{file}: {', '.join(new) or 'registers no variant and no codebook'}", error=True)


def _run(file: str) -> None:
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"plugin {file}: no such file of Python; wanted one such as my_variant.py")
    own = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"minilora_plugin_{own}_{path.stem}"  # two files may have one name
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"plugin {file}: cannot be imported; wanted a file such as my_variant.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look for it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        raise ConfigError(
            f"plugin {file}{f', line {line}' if line else ''}: {type(error).__name__}: {error}"
        ) from error

"""``argparse`` with errors as everywhere in minilora: one line with the flag, the value, and the known flag or the form that was wanted."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from minilora.cli.spelling import closest, in_our_words
from minilora.errors import ConfigError

__all__ = ["Parser", "one_of"]


class Parser(argparse.ArgumentParser):
    """No abbreviations (a flag that is added later would change what an old script means), and ``ConfigError`` for every mistake.

    Args:
        prog: how it is called. description: what it does, a sentence. module: has ``flags(parser)``, ``run(arguments)``, ``USAGE`` and
            ``EXAMPLES`` of a command, and is imported when the command is called.
    """

    def __init__(self, prog: str, description: str, module: str = "", **more: Any) -> None:
        super().__init__(prog, description=description, formatter_class=_Formatter, allow_abbrev=False, **more)
        self.commands: dict[str, Parser] = {}
        self.module = module
        self.refused: dict[str, str] = {}  # flags of other commands, and why they are none of this one
        self.register("type", int, _whole)
        self.register("type", float, _number)
        self.add_argument("--debug", action="store_true", help="show the traceback of an error (default: off)")

    def add_command(self, name: str, about: str, module: str) -> None:
        """Give the parser a command."""
        if not self.commands:
            self._chosen = self.add_subparsers(title="commands", prog=self.prog, required=True, metavar="COMMAND")
        sentence = about[0].upper() + about[1:] + "."
        self.commands[name] = self._chosen.add_parser(name, help=about, description=sentence, module=module)

    def load(self) -> Parser:
        """Itself, with the flags of its command."""
        if self.module:
            command = importlib.import_module(self.module)
            self.module = ""
            self.usage, self.epilog = f"{self.prog} {command.USAGE}", f"examples:\n{command.EXAMPLES}"
            self.set_defaults(run=command.run)
            command.flags(self)
        return self

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A flag or command that does not exist is told before anything else: it may be why another one seems to be missing."""
        self.load()
        words = list(sys.argv[1:] if args is None else args)
        words = words if self.commands else in_our_words(words, self._option_string_actions)
        flags = list(takewhile(lambda word: word.startswith("-"), words)) if self.commands else words
        for word in takewhile(lambda word: word != "--", flags):
            self._check_flag(word, words)
        if self.commands and (verb := next(iter(words[len(flags) :]), None)) and verb not in self.commands:
            known = ", ".join(self.commands)
            raise ConfigError(
                f"command {verb!r} is unknown; the closest are {closest(verb, self.commands)}, all are {known}"
            )
        found, extra = super().parse_known_args(words, namespace)
        if extra:
            raise ConfigError(f"{extra[0]!r} belongs to no flag; quote text with spaces, or see {self.prog} --help")
        return found, extra

    def _check_flag(self, word: str, words: Sequence[str]) -> None:
        flag, equals, value = word.partition("=")
        if not word.startswith("-") or " " in flag or len(word) == 1 or _is_number(word):
            return
        action = self._option_string_actions.get(flag)
        if action is None:
            if why := self.refused.get(flag.replace("--no-", "--", 1)):
                raise ConfigError(f"{flag}: {why}")
            owners = [name for name, command in self.commands.items() if flag in command.load()._option_string_actions]
            if owners:
                verb = next((word for word in words if word in owners), owners[0])
                raise ConfigError(f"{flag}: comes after the command; write {self.prog} {verb} {flag}")
            for alone in self._get_positional_actions():
                if flag.strip("-").removesuffix("s") == alone.dest:
                    raise ConfigError(f"{flag}: unknown flag; a {alone.dest} stands without one, in quotes")
            known = [name for name in self._option_string_actions if name.startswith("--")]
            raise ConfigError(
                f"{flag}: unknown flag; the closest are {closest(flag, known)}; {self.prog} --help shows all of them"
            )
        if equals and action.nargs == 0:
            raise ConfigError(f"{flag}: takes no value, found {value!r}; write {flag} alone")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """After ``--help`` and ``--version``; what is shown goes out now, where a reader that has left is noticed."""
        sys.stdout.flush()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Every complaint of argparse's own."""
        if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
            raise ConfigError(f"{missing[1]}: missing; see {self.prog} --help")
        flag, _, rest = message.removeprefix("argument ").partition(": ")
        if rest.startswith("expected"):
            raise ConfigError(
                f"{flag}: its value is missing; write {flag} VALUE, or {flag}=VALUE if it begins with '-'"
            )
        raise ConfigError(f"{flag}: {rest}" if rest else f"{message}; see {self.prog} --help")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Room for long flags, and no line that ends within ``all-linear``."""

    def __init__(self, prog: str, **more: Any) -> None:
        super().__init__(prog, max_help_position=28, **more)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """A ``type`` for ``add_argument``: one of these words, with the closest of them in the error."""

    def check(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; wanted one of {', '.join(choices)}")
        return text

    return check


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is no whole number; wanted one such as 8") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:100]!r} is no number; wanted one such as 0.5 or 1e-3") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

"""What minilora raises. Every message is one line: what was got, what was wanted, the way out.

All types share :class:`MiniLoraError`, so a caller can catch the library and nothing else; each also derives from the built-in
type that code written for PEFT or torch would have caught. Next file to read: ``lora/config.py``.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Interrupted",
    "KindError",
    "MiniLoraError",
    "MissingPackageError",
    "OutOfMemory",
    "QuantizationError",
    "ServerError",
    "StateError",
    "TargetError",
    "TrainingError",
    "WriteError",
    "for_terminal",
    "nearest",
    "printable",
    "warn",
]

# Control characters (escape sequences begin with one), marks that turn the direction of text, and halves of pairs, which no stream takes.
_STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LONGEST = 1200  # signs of a message
_LONGEST_WORD = 100  # signs that are compared with known names


class MiniLoraError(Exception):
    """Base of every error that minilora raises on purpose; ``exit_code`` is what the command line ends with.

    A name or value in a message may be of any length and hold any sign; the message is one line that a terminal shows as it is: what
    cannot be printed (line ends, escape sequences, marks that turn the direction of text) is written out, and the middle of a long one
    left out.
    """

    exit_code = 2  # the input was wrong
    told: bool | None = None  # whether another process of the run says it; None: not judged by the processes of a run

    def __init__(self, message: str = "") -> None:
        text = printable(str(message))
        super().__init__(text if len(text) <= _LONGEST else f"{text[: _LONGEST * 2 // 3]} ... {text[-_LONGEST // 3 :]}")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn in one printable line that points at whoever called minilora, from however deep inside."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "minilora":
        frame, level = frame.f_back, level + 1
    warnings.warn(printable(message), category, stacklevel=level)


def printable(text: str) -> str:
    """The text with every sign that is no letter, figure, mark or space written as Python writes it: ``\\n``, ``\\x1b``."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def for_terminal(text: str, encoding: str | None = None) -> str:
    """Text of a model or a file as a terminal may get it: line ends, tabs and all letters stay; what steers a terminal is written out.

    So is what ``encoding``, the stream's, has no bytes for (on Windows it need not be UTF-8).
    """
    shown = _STEERS.sub(lambda found: repr(found[0])[1:-1], text)
    return shown.encode(encoding, "backslashreplace").decode(encoding) if encoding else shown


class ConfigError(MiniLoraError, ValueError):
    """A field of a config has a value that cannot be meant."""


class KindError(ConfigError, TypeError):
    """An argument is of a type, or a model of a kind, that the call cannot work on."""


class TargetError(MiniLoraError, ValueError):
    """A name given as target matches nothing, or matches something that cannot take an adapter."""


class StateError(MiniLoraError, RuntimeError, ValueError):
    """The call does not fit the state of the model (no adapter, merged already, name taken)."""


class QuantizationError(MiniLoraError, ValueError):
    """A tensor cannot be quantized, or stored codes and scales do not fit together."""


class CheckpointError(MiniLoraError, RuntimeError, ValueError):
    """A file on disk is missing, damaged, or does not fit the model (where torch raises ``RuntimeError``)."""


class WriteError(CheckpointError):
    """The system does not let a file be written: no room, no right, a broken disk. What was there before is still there."""

    exit_code = 1


class TrainingError(StateError):
    """A run cannot go on: too many steps in a row without a finite loss or gradient. The last good state is saved."""

    exit_code = 1


class OutOfMemory(MiniLoraError, MemoryError):
    """A step did not fit into memory. The last finished step is saved."""

    exit_code = 1


class Interrupted(MiniLoraError):
    """Ctrl-C or SIGTERM ended a run after a whole step, which is saved. ``signal`` is its number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
        self.exit_code = 128 + signal  # as shells count: 130 and 143


class DataError(MiniLoraError, ValueError):
    """A training example cannot be used; the message has path and line."""


class ServerError(MiniLoraError, ConnectionError):
    """A server could not be asked: it is not there, does not answer in time, or answers what no such server answers."""


class MissingPackageError(MiniLoraError, ImportError):
    """An optional package is needed for this call; the message has the install command."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """``word``'s closest spellings among ``known`` as a readable list, or the first few known names when none is close."""
    names = sorted(set(known))
    close = difflib.get_close_matches(word[:_LONGEST_WORD], names, n=count, cutoff=0.5) or names[:count]
    return ", ".join(repr(name) for name in close) if close else "nothing"

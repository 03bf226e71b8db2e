"""The one way in which a command prints: what a model or a file says reaches the terminal as text, and never steers it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from minilora.errors import for_terminal

__all__ = ["say", "say_styled", "write"]


def say(text: str, error: bool = False) -> None:
    """Print a text and a line end at once, to standard output, or to standard error."""
    stream = sys.stderr if error else sys.stdout
    print(for_terminal(text, stream.encoding), file=stream, flush=True)


def write(piece: str) -> None:
    """A piece of a text to standard output at once, without a line end."""
    sys.stdout.write(for_terminal(piece, sys.stdout.encoding))
    sys.stdout.flush()


def say_styled(pieces: Iterable[tuple[str, str]]) -> None:
    """Print a line of texts with their styles, which rich shows on a terminal; elsewhere, and without rich, the texts alone."""
    console, texts = _console(), [(for_terminal(text, sys.stdout.encoding), style) for text, style in pieces]
    if console is None:
        say("".join(text for text, _ in texts))
        return
    from rich.text import Text

    console.print(Text.assemble(*texts))


def _console() -> Any:
    """Where rich prints; None without rich or without a terminal."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=sys.stdout, highlight=False)

"""The one way in which a command prints: what a model or a file says reaches the terminal as text, and never steers it."""

from __future__ import annotations

import sys

from minilora.errors import for_terminal

__all__ = ["say", "write"]


def say(text: str, error: bool = False) -> None:
    """Print a text and a line end at once, to standard output, or to standard error."""
    stream = sys.stderr if error else sys.stdout
    print(for_terminal(text, stream.encoding), file=stream, flush=True)


def write(piece: str) -> None:
    """A piece of a text to standard output at once, without a line end."""
    sys.stdout.write(for_terminal(piece, sys.stdout.encoding))
    sys.stdout.flush()

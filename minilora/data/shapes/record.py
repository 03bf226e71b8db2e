"""A record that knows where it was read and of what shape it was. Next file: ``data/shapes/recognise.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Line", "Record"]

Record = Mapping[str, Any]


class Line(dict[str, Any]):
    """A record of one of the three forms: ``messages``, ``prompt`` and ``completion``, or ``text``.

    Attributes:
        where, line: file and line for messages, and the line's number. notes: keys of the file's line that nothing uses.
        shape: what it was, for people. apart: what stands between a prompt and its completion where no chat template does it.
    """

    where: str = ""
    line: int = 0
    notes: tuple[str, ...] = ()
    shape: str = ""
    apart: str = ""

"""Tables: as text with bars for a terminal, as markdown, as HTML; and how a number is written in them.

A row is a name, a text for each column, and (where a bar makes sense) a value for each column.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Row",
    "as_html",
    "as_markdown",
    "as_text",
    "html_table",
    "html_text",
    "human_bytes",
    "most_of",
    "short_number",
]

_WIDTH = 24  # characters of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_NOT_TEXT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        name: what is shown. texts: one for each column. values: the lengths of its bars, one for each column, None for no bar there;
            empty: no bars. group: the bars of one group share one scale.
    """

    name: str
    texts: Sequence[str]
    values: Sequence[float | None] = ()
    group: str = ""


def as_text(columns: Sequence[str], rows: Sequence[Row], bars: bool = True) -> str:
    """Aligned columns; ``bars`` adds one for each of a row's values, named by its column's first word."""
    cells = [["", *columns], *([row.name, *row.texts] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns) + 1)]
    lines = [_aligned(cells[0], widths)]
    for row, line in zip(rows, cells[1:], strict=True):
        drawn = [(place, value) for place, value in enumerate(row.values) if value is not None] if bars else []
        most = most_of(rows, row.group)
        names = [name.split()[0] for name in columns] if len(columns) > 1 else [""]
        pieces = [f"  {_bar(value / most)} {names[place]}" for place, value in drawn]
        lines.append(_aligned(line, widths) + (pieces[0] if pieces else ""))
        lines += [" " * (sum(widths) + 2 * len(columns)) + piece for piece in pieces[1:]]
    return "\n".join(line.rstrip() for line in lines)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(
        [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
    )


def _bar(share: float) -> str:
    eighths = round(8 * _WIDTH * min(1.0, max(0.0, share)))
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()) or "▏"


def most_of(rows: Sequence[Row], group: str) -> float:
    """The longest bar of a group; 1 where there is none."""
    return max((v for row in rows if row.group == group for v in row.values if v is not None), default=0.0) or 1.0


def as_markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """A table for a README."""
    lines = [["", *columns], ["---", *["---:"] * len(columns)], *([row.name, *row.texts] for row in rows)]
    return "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_html(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """The texts as a table of a page."""
    numeric = range(1, len(columns) + 1)
    return html_table(["", *columns], [(row.name, *row.texts) for row in rows], numeric, "scroll")


def html_table(
    heads: Sequence[Any], rows: Iterable[Sequence[Any]], numeric: Sequence[int] = (), look: str = "scroll low"
) -> str:
    """A table of a page, which scrolls by itself where it is too wide. ``numeric``: the columns of numbers."""
    inner = ""
    for index, cells in enumerate([heads, *rows]):
        tag = "td" if index else "th"
        marks = [' class="num"' if column in numeric else "" for column in range(len(cells))]
        row = "".join(f"<{tag}{mark}>{html_text(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=True))
        inner += f"<tr>{row}</tr>"
    return f'<div class="{look}"><table>{inner}</table></div>'


def html_text(value: Any) -> str:
    """Safe inside HTML and inside XML, which has no word at all for control characters and lone surrogates."""
    return html.escape(plain_text(value))


def plain_text(value: Any) -> str:
    """``value`` as text that can be shown, with a sign of its own for each character that cannot."""
    return _NOT_TEXT.sub("\ufffd", str(value))


# ---- numbers


def as_number(value: Any) -> float:
    """As a float; beyond 1e100 infinite, where the arithmetic of an axis would overflow."""
    number = float(value)
    return number if abs(number) < 1e100 else number * math.inf


def finite_pairs(pairs: Iterable[tuple[Any, float]]) -> list[tuple[Any, float]]:
    """Those whose value can be drawn."""
    return [pair for pair in pairs if math.isfinite(pair[1])]


def short_number(value: float, form: str = ",.4g") -> str:
    """Four digits, as a reader writes them: 2e-05 is 2e-5."""
    return re.sub(r"e(-?)\+?0*(\d)", r"e\1\2", f"{value:{form}}")


def human_bytes(count: float) -> str:
    """In powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 999.5:  # what would round to 1000 belongs to the next unit
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"

"""Figures side by side: as text with bars for a terminal, as markdown, and as a page that needs nothing else.

A row is a name, a text for each column, and (where a bar makes sense) a value for each column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minilora.report.page import page
from minilora.report.pictures import bar_groups, html_section, html_table, html_text

__all__ = ["Row", "as_markdown", "as_page", "as_text"]

_WIDTH = 24  # characters of the longest bar
_EIGHTHS = " ▏▎▍▌▋▊▉█"


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
        most = _most(rows, row.group)
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


def _most(rows: Sequence[Row], group: str) -> float:
    return max((v for row in rows if row.group == group for v in row.values if v is not None), default=0.0) or 1.0


def as_markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """A table for a README."""
    lines = [["", *columns], ["---", *["---:"] * len(columns)], *([row.name, *row.texts] for row in rows)]
    return "\n".join("| " + " | ".join(cell.strip().replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_page(
    title: str, subtitle: str, headline: Sequence[Mapping[str, str]], columns: Sequence[str], rows: Sequence[Row],
    notes: Sequence[str], more: str = "", settings: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The table and its bars as one HTML page. ``more`` is HTML that follows them."""
    words = "".join(f"<p>{html_text(note)}</p>" for note in notes)
    body = html_section("Side by side", bar_groups(columns, rows) + f"<p></p>{words}") + more
    body += html_section("Settings", html_table(["setting", ""], settings.items())) if settings else ""
    return page(title, subtitle, headline, body)

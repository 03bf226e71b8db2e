"""Values of a finding's table as text, and as JSON and back.

A mean has its ends beside it: ``1.21 (1.16 to 1.26)``; values by seed, such as ``{0: 1.20, 1: 1.22}``, are shown as their interval. Next
file: ``lab/trying/tried.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from minilora.errors import ConfigError
from minilora.lab.verdicts.interval import Interval, interval
from minilora.report.tables import Row, as_text, short_number

__all__ = ["as_lines", "pack", "shown", "table", "unpack"]


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[Row]]:
    """Columns without the first, and the rows named by it, as ``report/tables.py`` takes them; a row may lack a column."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[shown(row.get(name)) for name in columns] for row in rows]
    return columns[1:], [Row(line[0], line[1:]) for line in lines]


def as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of a terminal; "" without any."""
    if not rows:
        return ""
    columns, lines = table(rows)
    first, *rest = as_text(columns, lines, bars=False).splitlines()
    name = next(iter(rows[0]))
    wide = max(0, len(name) - max(len(line.name) for line in lines))  # by which the first column has to grow
    grown = [line[: len(one.name)] + " " * wide + line[len(one.name) :] for one, line in zip(lines, rest, strict=True)]
    return "\n".join([name + (" " * wide + first)[len(name) :], *grown])


def shown(value: Any) -> str:
    """A value in words and four digits."""
    if value is None or isinstance(value, bool):
        return "" if value is None else "yes" if value else "no"
    if isinstance(value, Interval):
        ends = f"{short_number(value.low)} to {short_number(value.high)}" if math.isfinite(value.half) else "one seed"
        return f"{short_number(value.mean)} ({ends})"
    if isinstance(value, Mapping):
        if value and all(isinstance(one, (int, float)) and math.isfinite(one) for one in value.values()):
            return shown(interval(value.values()))
        return ", ".join(f"{name}: {shown(one)}" for name, one in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(shown, value))
    if isinstance(value, int):
        return f"{value:,}"
    return short_number(value) if isinstance(value, float) else str(value)


def pack(value: Any) -> Any:
    """The value as JSON can hold it, intervals and numbers that are not finite included.

    Raises:
        ConfigError: of another type than numbers, texts, intervals, and lists and tables of them.
    """
    value = value.item() if hasattr(value, "item") else value  # a scalar of torch or numpy
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Interval):
        ends = [pack(getattr(value, name)) for name in ("mean", "low", "high", "spread")]
        return {"interval": ends, "count": value.count}
    if isinstance(value, Mapping):
        return {"table": [[pack(name), pack(one)] for name, one in value.items()]}
    if isinstance(value, Sequence):
        return [pack(one) for one in value]
    raise ConfigError(
        f"a finding holds a {type(value).__name__}; wanted numbers, texts, intervals, and lists and tables of them"
    )


def unpack(value: Any) -> Any:
    """What ``pack`` was given; a tuple is a list."""
    if isinstance(value, list):
        return [unpack(one) for one in value]
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float(value["float"])
    if "interval" in value:
        mean, low, high, spread = map(unpack, value["interval"])
        return Interval(mean, low, high, spread, value["count"])
    return {unpack(name): unpack(one) for name, one in value["table"]}

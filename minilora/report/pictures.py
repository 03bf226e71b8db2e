"""The pictures and tables of a report: inline SVG and HTML, coloured by the classes that ``report.STYLE`` defines.

Numbers that are not finite become gaps and are named in words; every text is escaped, every picture says in words what it shows.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Point = tuple[float, float]
Pair = tuple[str, str]  # labels of the x and of the y axis
Place = Callable[[Point], Point]  # from data to picture
Axis = tuple[float, float, list[tuple[float, str]]]  # low, high, (value, label) of each tick; log10 where log
MOST_POINTS = 800  # per path: finer than any screen column, and 10,000 steps stay a small file
WIDE, SMALL, FONT = 692, 334, 12  # px: pictures of two thirds and of one third of the page, and their type
CIVIDIS = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56))
LAYER_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")  # a component of a dotted path that is a number
NOT_TEXT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


# ---- line charts


class Line(NamedTuple):
    name: str
    points: Sequence[Point]
    look: str  # CSS classes: c0 .. c5 the colour; thin, dash, dots the manner


def line_chart(heading: str, lines: Sequence[Line], labels: Pair, size: tuple[int, int], log: bool = False) -> str:
    seen = [point for line in lines for point in finite_pairs(line.points)]
    keys = "".join(f'<span class="key {line.look}">{html_text(line.name)}</span>' for line in lines) * (len(lines) > 1)
    picture = "<p>nothing here can be drawn</p>"
    if seen:
        x = _linear_axis([px for px, _ in seen], whole=True)
        y = (_log_axis if log else _linear_axis)([py for _, py in seen])
        axes, place = _axes(x, y, labels, size, log)
        words = f"{heading} by {labels[0]}. " + " ".join(in_words(line) for line in lines)
        picture = _svg(*size, words, axes + "".join(_drawn(line, place) for line in lines))
    css = ' class="wide"' if size[0] > SMALL else ""
    return f"<figure{css}><figcaption><b>{html_text(heading)}</b>{keys}</figcaption>{picture}</figure>"


def _axes(x: Axis, y: Axis, labels: Pair, size: tuple[int, int], log: bool) -> tuple[str, Place]:
    """Grid, ticks and labels, and the function from data to picture; the margins fit the larger type of a phone."""
    em = _phone_font(size[0])
    left = 12 + 0.6 * em * max(len(text) for _, text in y[2])
    right = size[0] - 4 - 0.3 * em * max(len(text) for _, text in x[2])
    top, bottom = 2.2 * em, size[1] - 2.7 * em

    def across(value: float) -> float:
        return left + (right - left) * (value - x[0]) / (x[1] - x[0])

    def up(value: float) -> float:
        return bottom - (bottom - top) * (value - y[0]) / (y[1] - y[0])

    parts = [_label((left + right) / 2, size[1] - 5, labels[0]), _label(0, 1.1 * em, labels[1], "start")]
    for value, text in y[2]:
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{up(value):.1f}" y2="{up(value):.1f}"/>')
        parts.append(_label(left - 9, up(value), text, "end"))
    for value, text in x[2]:
        at = across(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:.1f}" y2="{bottom + 4:.1f}"/>')
        parts.append(_label(at, bottom + 1.15 * em, text))
    return "".join(parts), lambda point: (across(point[0]), up(math.log10(point[1]) if log else point[1]))


def _drawn(line: Line, place: Place) -> str:
    points, path, pen = _downsampled(line.points), "", "M"
    for point in points:
        if math.isfinite(point[1]):
            # h0 draws no length, which round ends show as a dot: a value alone between two gaps stays visible.
            x, y = place(point)
            path += f"{pen}{x:.1f} {y:.1f}" + "h0" * (pen == "M")
        pen = "L" if math.isfinite(point[1]) else "M"
    dotted = "dots" in line.look
    circles = ""
    for point in finite_pairs(points) if dotted or len(points) <= 10 else ():
        x, y = place(point)
        tip = html_text(f"{line.name}, {point[0]:.0f}: {short_number(point[1])}")
        circles += f'<circle class="{line.look}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{tip}</title></circle>'
    return circles if dotted else f'<path class="{line.look}" d="{path}"/>{circles}'


def _linear_axis(values: Sequence[float], whole: bool = False) -> Axis:
    """Ticks at round numbers. `whole` is for steps: no fractions, and the axis ends where the values do."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, 1e-30):  # a constant, or rounding noise around one
        size = size if size > 1e-30 else 0.5
        low, high = (-2 * size, 0.0) if high < 0 else (0.0, 2 * size)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
    if whole:
        step = max(1.0, step)
        numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    else:
        numbers = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
        low, high = numbers[0] * step, numbers[-1] * step
    return low, high, [(number * step, _tick(number * step, step, size)) for number in numbers]


def _log_axis(values: Sequence[float]) -> Axis:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high += low == high
    factors = (1, 2, 5) if high - low <= 2 else (1,)
    powers = range(low, high + 1, math.ceil((high - low) / 6))
    ticks = [(power + math.log10(factor), short_number(factor * 10.0**power)) for power in powers for factor in factors]
    return low, high, [tick for tick in ticks if tick[0] <= high]


def _tick(value: float, step: float, size: float) -> str:
    places = -math.floor(math.log10(step) + 1e-9)
    if value and (step >= 1e6 or (places > 3 and size < 0.01)):
        digits = max(0, math.floor(math.log10(abs(value)) + 1e-9) + places)
        return short_number(value, f".{digits}e")
    return f"{value:,.{max(0, places)}f}" if value else "0"


def _downsampled(points: Sequence[Point]) -> Sequence[Point]:
    """Keep the lowest and the highest of each bucket, so that no spike is lost, and one gap wherever there is any."""
    if len(points) <= MOST_POINTS:
        return points
    kept: list[Point] = []
    for bucket in range(MOST_POINTS // 2):
        first, last = (edge * len(points) * 2 // MOST_POINTS for edge in (bucket, bucket + 1))
        part = points[first:last]
        ends = {end(finite_pairs(part), key=lambda point: point[1]) for end in (min, max) if finite_pairs(part)}
        kept += sorted([*ends, *[point for point in part if not math.isfinite(point[1])][:1]])
    return kept


def smoothed(points: Sequence[Point], span: int) -> list[Point]:
    """Centred mean, so that the smooth line does not lag behind a falling one; gaps stay gaps."""
    smooth = []
    for index, (step, value) in enumerate(points):
        reach = min(span // 2, index, len(points) - 1 - index)
        around = finite_pairs(points[index - reach : index + reach + 1])
        smooth.append((step, sum(near for _, near in around) / len(around) if math.isfinite(value) else math.nan))
    return smooth


def in_words(line: Line) -> str:
    if not (seen := finite_pairs(line.points)):
        return f"{line.name}: no finite value."
    low, high = (end(seen, key=lambda point: point[1]) for end in (min, max))
    spots = ("first", seen[0]), ("last", seen[-1]), ("lowest", low), ("highest", high)
    return (
        f"{line.name}: " + ", ".join(f"{word} {short_number(value)} at {at:,.0f}" for word, (at, value) in spots) + "."
    )


# ---- heat map, bars, tables


def heat_map(layers: Sequence[tuple[str, float]]) -> str:
    """One row a kind of layer, one column a layer index; paths that would share a cell get rows of their own."""
    kinds = [path.rsplit(".", 1)[-1] for path, _ in layers]
    found = [LAYER_INDEX.search(path) for path, _ in layers]
    places = [int(match[0]) if match else None for match in found]
    if len(set(zip(kinds, places, strict=True))) < len(layers):
        kinds = [LAYER_INDEX.sub("*", path, count=1) for path, _ in layers]
    rows, columns = list(dict.fromkeys(kinds)), sorted(set(places), key=lambda place: (place is None, place))
    most = max((ratio for _, ratio in finite_pairs(layers)), default=0.0) or 1.0
    cell, tall, em = max(16.0, min(44.0, 880 / len(columns))), 28, 2 * FONT  # the type of a phone
    left = 14 + 0.6 * em * max(len(_clipped(row)) for row in rows)
    width, bottom = math.ceil(left + max(cell * len(columns), 300) + 24), len(rows) * tall
    parts = [_label(left - 8, (row + 0.5) * tall, _clipped(kind), "end") for row, kind in enumerate(rows)]
    for column in range(0, len(columns), math.ceil(1.5 * em / cell)):  # only as many numbers as find room
        name = "none" if columns[column] is None else columns[column]
        parts.append(_label(left + (column + 0.5) * cell, bottom + em, name))
    for (path, ratio), kind, place in zip(layers, kinds, places, strict=True):
        look = f'fill="{_colour(ratio / most)}"' if math.isfinite(ratio) else 'class="hole"'
        x, y = left + columns.index(place) * cell + 1, rows.index(kind) * tall + 1
        tip = f"<title>{html_text(path)}: {short_number(ratio)}</title>"
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{cell - 2:.1f}" height="26" rx="2" {look}>{tip}</rect>')
    parts.append(_legend(left, bottom + 2.3 * em, em, most))
    words = f"Heat map of ‖ΔW‖ / ‖W‖, 0 to {short_number(most)}: {len(rows)} kinds of layer by {len(columns)} layer indices."
    return f"<figure>{_svg(width, math.ceil(bottom + 5 * em), words, ''.join(parts))}</figure>"


def _legend(x: float, y: float, em: float, most: float) -> str:
    parts = [_label(x, y, "layer index; colour: ‖ΔW‖ / ‖W‖", "start")]
    for share in (part / 30 for part in range(31)):
        look = f"stroke:{_colour(share)};stroke-width:10.5;stroke-linecap:butt"
        parts.append(f'<path d="M{x + 300 * share:.1f} {y + 0.6 * em:.0f}v14" style="{look}"/>')
    parts += [_label(x + 300 * share, y + 2.3 * em, short_number(share * most)) for share in (0, 0.5, 1)]
    return "".join(parts)


def bar_table(heads: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> str:
    """A table with a bar in its first column; a row is a name, the value of its bar, and the texts of the columns."""
    most = max((row[1] for row in rows if math.isfinite(row[1])), default=0.0) or 1.0
    shares = [max(0.0, row[1] / most) if math.isfinite(row[1]) else 0.0 for row in rows]
    return html_table(heads, [(name, *cells) for name, _, *cells in rows], numeric=(1,), shares=shares)


def bar_groups(columns: Sequence[str], rows: Sequence[Any]) -> str:
    """A table with a bar for every column of a row.

    A row has ``name``, ``texts``, ``values`` (None or left out: no bar) and ``group``: bars of one group are on one scale.
    """
    seen = [
        place for place in range(len(columns)) if any(list(row.values)[place:] and row.values[place] for row in rows)
    ]
    keys = "".join(f'<span class="key dots c{place}">{html_text(columns[place])}</span>' for place in seen)
    heads = "".join(f'<th class="num">{html_text(name)}</th>' for name in columns)
    inner = f'<tr><th></th><th class="bars">{keys}</th>{heads}</tr>'
    for row in rows:
        most = max((v for r in rows if r.group == row.group for v in r.values if v is not None), default=0.0) or 1.0
        bars = "".join(
            f'<div class="bar c{place}" style="width:{100 * value / most:.1f}%" title="{html_text(row.texts[place])}"></div>'
            for place, value in enumerate(row.values)
            if value is not None
        )
        texts = "".join(f'<td class="num">{html_text(text)}</td>' for text in row.texts)
        inner += f"<tr><td>{html_text(row.name)}</td><td>{bars}</td>{texts}</tr>"
    return f'<div class="scroll tall"><table>{inner}</table></div>'


def html_table(
    heads: Sequence[Any], rows: Iterable[Sequence[Any]], numeric: Sequence[int] = (), shares: Sequence[float] = ()
) -> str:
    bars = [f'<div class="bar" style="width:{100 * share:.1f}%"></div>' for share in shares]
    inner = ""
    for index, cells in enumerate([heads, *rows]):
        tag, bar = ("td", bars[index - 1] if bars else "") if index else ("th", "")
        marks = [' class="num"' if column in numeric else "" for column in range(len(cells))]
        texts = [html_text(cell) + bar * (column == 0) for column, cell in enumerate(cells)]
        row = "".join(f"<{tag}{mark}>{text}</{tag}>" for mark, text in zip(marks, texts, strict=True))
        inner += f"<tr>{row}</tr>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def html_section(heading: str, body: str | Sequence[Any], lead: str = "") -> str:
    words = f'<p class="soft">{html_text(lead)}</p>' if lead else ""
    return f"\n<section><h2>{html_text(heading)}</h2>{words}{body}</section>" if body else ""


def _svg(width: int, height: int, words: str, body: str) -> str:
    """A picture that shrinks with the page, to half its size at most; on a phone its type grows by what it shrinks."""
    narrow = f"--phone-font:{_phone_font(width):.1f}px;--phone-width:{width * FONT / _phone_font(width):.0f}px"
    look = f'style="{narrow};max-width:{width * 1.1:.0f}px"'
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html_text(words)}" {look}>{body}</svg>'


def _phone_font(width: int) -> float:
    return FONT / min(1.0, max(0.5, 340 / width))


def _label(x: float, y: float, text: Any, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html_text(text)}</text>'


# ---- numbers and words


def html_text(value: Any) -> str:
    """Safe inside HTML and inside XML, which has no word at all for control characters and lone surrogates."""
    return html.escape(NOT_TEXT.sub("\ufffd", str(value)))


def as_number(value: Any) -> float:
    number = float(value)
    return number if abs(number) < 1e100 else number * math.inf  # beyond, the arithmetic of an axis would overflow


def points_of(entries: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    return [(float(entry["step"]), as_number(entry[key])) for entry in entries if entry.get(key) is not None]


def finite_pairs(pairs: Iterable[tuple[Any, float]]) -> list[tuple[Any, float]]:
    return [pair for pair in pairs if math.isfinite(pair[1])]


def gaps_in_words(what: str, points: Sequence[tuple[Any, float]], log: bool = False) -> str:
    """Name the values that a picture leaves out."""
    bad = [(where, value) for where, value in points if not math.isfinite(value) or (log and value <= 0)]
    if not bad:
        return ""
    some = ", ".join(f"{value:g} at {where if isinstance(where, str) else int(where)}" for where, value in bad[:5])
    more = f" and {len(bad) - 5:,} more" if len(bad) > 5 else ""
    return f'<p class="warn">{html_text(what)}: {len(bad):,} of {len(points):,} not drawn: {html_text(some)}{more}.</p>'


def short_number(value: float, form: str = ",.4g") -> str:
    return re.sub(r"e(-?)\+?0*(\d)", r"e\1\2", f"{value:{form}}")  # 2e-05 is 2e-5 on an axis


def human_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 999.5:  # what would round to 1000 belongs to the next unit
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def _clipped(name: str) -> str:
    return name if len(name) <= 26 else f"{name[:9]}…{name[-16:]}"  # both ends tell one layer from another


def _colour(share: float) -> str:
    at = min(1.0, max(0.0, share)) * (len(CIVIDIS) - 1)
    low = min(int(at), len(CIVIDIS) - 2)
    mixed = [round(a + (at - low) * (b - a)) for a, b in zip(CIVIDIS[low], CIVIDIS[low + 1], strict=True)]
    return "#{:02x}{:02x}{:02x}".format(*mixed)

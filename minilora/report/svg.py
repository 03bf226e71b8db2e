"""A figure as part of a page: inline SVG whose colours are the page's variables, so that light and dark follow the reader.

matplotlib writes an SVG that stands alone, with fonts, ids, clip paths and colours of its own. Here only what is seen is kept: paths and
texts. Text stays text, in the page's font; a colour of ``COLOURS`` becomes ``var(--name)``; the same figure gives the same bytes.
"""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from minilora.report.tables import html_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "SERIES", "hover", "inline_svg", "svg_file"]

# A variable of the page: its colour in the light, which is the figure's own, and in the dark.
COLOURS = {
    "page": ("#fcfcfb", "#14161a"),
    "card": ("#f3f4f3", "#1d2026"),
    "ink": ("#1b1e22", "#e7e9ec"),
    "soft": ("#5b636d", "#a3abb5"),
    "line": ("#dde0e4", "#31363e"),
    "c0": ("#0072b2", "#56b4e9"),
    "c1": ("#c25400", "#f0903c"),
    "c2": ("#00825f", "#2fc79b"),
    "c3": ("#b04a88", "#e29bc4"),
    "c4": ("#8a6d00", "#f0e442"),
    "c5": ("#636b76", "#9ba3ad"),
}
SERIES = tuple(light for name, (light, _) in COLOURS.items() if re.fullmatch(r"c\d", name))
# Of its own size, how small and how large a page shows a picture: below, it scrolls, so that its type of 12 px stays above 10.
SMALLEST, LARGEST = 0.85, 1.1
_PX = 96 / 72  # CSS pixels of a point
_VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}
_LINK = "{http://www.w3.org/1999/xlink}href"
_HOVER = "minilora_hover"
_DISC = re.compile(r"M 0 ([\d.]+)\s+(C[^C]+){8}z")  # as matplotlib draws one, from eight curves


def hover(artist: Any, texts: Sequence[str]) -> None:
    """What a reader sees who points at what ``artist`` draws: a text for each of its markers or, without markers, of its patches."""
    setattr(artist, _HOVER, tuple(texts))


def inline_svg(figure: Figure, words: str) -> str:
    """The figure as one ``<svg>`` of a page: as wide as the page lets it be, of the page's colours and font.

    Args:
        figure: one whose artists stay inside their axes, since nothing is clipped.
        words: what it shows, for who cannot see it.

    Returns:
        SVG without ids, links, styles of its own or anything to load. Text of 9 points is 12 px high on the page.
    """
    told = [artist for axes in figure.axes for artist in (*axes.lines, *axes.collections) if hasattr(artist, _HOVER)]
    kept = [artist.get_gid() for artist in told]
    names = [f"hover {number}" for number in range(len(told))]  # matplotlib's own ids have no blank
    try:
        for artist, name in zip(told, names, strict=True):
            artist.set_gid(name)
        root = ElementTree.fromstring(_standalone(figure))
    finally:
        for artist, gid in zip(told, kept, strict=True):
            artist.set_gid(gid)
    markers = {node.attrib["id"]: node.attrib["d"] for node in root.iter() if {"id", "d"} <= node.attrib.keys()}
    tips = _tips(root, {name: getattr(artist, _HOVER) for name, artist in zip(names, told, strict=True)})
    width, height = (float(side) for side in root.attrib["viewBox"].split()[2:])
    size = f"min-width:{SMALLEST * _PX * width:.0f}px;max-width:{LARGEST * _PX * width:.0f}px"
    drawn = filter(None, (_element(node, markers, tips.get(node, "")) for node in root.iter()))
    # What several elements in a row have in common is said once.
    alike = itertools.groupby(drawn, key=lambda element: element[0])
    body = "".join(f'<g style="{look}">{"".join(text for _, text in group)}</g>' for look, group in alike)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html_text(words)}" style="{size}">{body}</svg>'


def svg_file(figure: Figure, words: str, dark: bool = False) -> str:
    """The figure as an SVG file without a background, for a light or a dark page; arguments as ``inline_svg``."""
    drawn = re.sub(r"var\(--(\w+)\)", lambda found: COLOURS[found[1]][dark], inline_svg(figure, words))
    width, height = (f"{_PX * 72 * side:.0f}" for side in figure.get_size_inches())
    size = f'width="{width}" height="{height}" font-family="system-ui,Segoe UI,DejaVu Sans,sans-serif"'
    return drawn.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" {size} ', 1) + "\n"


def _standalone(figure: Figure) -> bytes:
    """What matplotlib writes."""
    import matplotlib

    file, engine = io.BytesIO(), figure.get_layout_engine()
    with matplotlib.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # matplotlib measures with its own font, not the page's
        try:
            if engine is not None:  # once, where savefig would do it twice
                engine.execute(figure)
                figure.set_layout_engine(None)
            figure.savefig(file, format="svg", facecolor="none")
        finally:
            figure.set_layout_engine(engine)
    return file.getvalue()


def _tips(root: Element, texts: dict[str, Sequence[str]]) -> dict[Element, str]:
    """The text of each element that has one: of the markers of a named group or, without markers, of its paths."""
    tips: dict[Element, str] = {}
    for group in root.iter():
        if given := texts.get(group.attrib.get("id", "")):
            drawn = [node for node in group.iter() if _kind(node) == "use"]
            drawn = drawn or [node for node in group.iter() if _kind(node) == "path"]
            tips |= zip(drawn, given, strict=True)
    return tips


def _kind(node: Element) -> str:
    return node.tag.rpartition("}")[2]


def _element(node: Element, markers: dict[str, str], tip: str) -> tuple[str, str] | None:
    """The look of one element and the element; None for what draws nothing, as groups, definitions and colours "none" do."""
    kind, given = _kind(node), node.attrib
    style = dict(part.split(": ", 1) for part in given.get("style", "").split("; ") if part)
    look = ";".join(f"{name}:{_VARIABLES.get(value, value)}" for name, value in style.items() if name != "font-family")
    if kind == "text":
        at = "".join(f' {name}="{_short(given[name])}"' for name in ("x", "y", "transform") if name in given)
        at = re.sub(r' transform="rotate\(-0 [^"]*"', "", at)
        return look, f"<text{at}>{html_text(node.text)}</text>"
    if kind not in ("path", "use") or "id" in given or {style.get("fill"), style.get("stroke", "none")} == {"none"}:
        return None
    if kind == "path" and "d" not in given:  # a line of which nothing is finite
        return None
    told = f"<title>{html_text(tip)}</title>" if tip else ""
    if kind == "path":
        return look, f'<path d="{_short(given["d"])}">{told}</path>'
    shape, x, y = markers[given[_LINK].removeprefix("#")], _short(given["x"]), _short(given["y"])
    if disc := _DISC.match(shape):
        return look, f'<circle cx="{x}" cy="{y}" r="{_short(disc[1])}">{told}</circle>'
    return look, f'<path d="{_short(shape)}" transform="translate({x} {y})">{told}</path>'


def _short(numbers: str) -> str:
    """Coordinates to a hundredth of a point, and no more blanks than they need."""
    exact = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), numbers)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", exact).strip()

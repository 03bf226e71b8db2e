"""The page of claims that were tried: ``lab.md`` and its figures, made from ``lab.json`` alone. Next file: ``lab/claims``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minilora.files.write import write_file, write_files
from minilora.lab.ground.claim import Picture
from minilora.lab.trying.cells import table
from minilora.lab.trying.tried import Tried
from minilora.report.canvas import missing
from minilora.report.claim_figures import claim_figure
from minilora.report.svg import svg_file

__all__ = ["PAGE_FILE", "write_page"]

PAGE_FILE, FIGURES = "lab.md", "lab"
_TOP = """\
# The lab

Claims of the papers on LoRA, each tried again here by the smallest experiment that could show it to be wrong. `minilora lab` lists
them, `minilora lab` with a name tries one, and `make lab` writes this page.

A verdict is about this ground: a language model of 0.8 million parameters that reads bytes, short fine-tunings on Python's own
source, and a learning rate that is tuned for everything that is compared. It is computed, and nobody writes it down: *holds here* and
*fails here* need an interval of 95 % over seeds that lies wholly on one side of what the claim says, and all else is *undecided here*.
A large model may do otherwise."""


def write_page(folder: Path, every: Mapping[str, Tried]) -> None:
    """Write the page of these claims, in the order of their names, and their figures beside it. Raises ``WriteError``."""
    figures: dict[str, bytes] = {}
    if not missing():
        for name, tried in every.items():
            if tried.finding is not None and tried.finding.picture is not None:
                figures |= _figures(name, tried.finding.picture)
    if figures:
        write_files(folder / FIGURES, figures)
    parts = [_TOP, _overview(every), *(_section(every[name], figures) for name in sorted(every))]
    write_file(folder / PAGE_FILE, "\n\n".join(filter(None, parts)) + "\n")


def _figures(name: str, picture: Picture) -> dict[str, bytes]:
    """The files of a picture: for a light page and for a dark one; none where no value of it is finite."""
    curves = {curve.name: curve.points for curve in picture.curves}
    if not any(math.isfinite(point[1]) for points in curves.values() for point in points):
        return {}
    axes: dict[str, Any] = {"log_x": picture.log_x, "log_y": picture.log_y, "top": picture.before}
    return {
        _file(name, dark): svg_file(claim_figure(picture.x, picture.y, curves, **axes), _words(picture), dark).encode()
        for dark in (False, True)
    }


def _file(name: str, dark: bool) -> str:
    return f"{name}{'-dark' * dark}.svg"


def _words(picture: Picture) -> str:
    """What the figure shows, for who cannot see it."""
    return f"{picture.y} over {picture.x}, a curve each for {', '.join(curve.name for curve in picture.curves)}"


def _leaves(picture: Picture) -> bool:
    return picture.before is not None and any(
        point[1] > picture.before for _, points in picture.curves for point in points
    )


def _overview(every: Mapping[str, Tried]) -> str:
    lines = []
    for name in sorted(every):
        tried = every[name]
        verdict = "could not be tried" if tried.finding is None else tried.finding.verdict
        lines.append([f"[{name}](#{name})", _plain(tried.claim.sentence), verdict, _time(tried.seconds)])
    whole = _time(sum(tried.seconds for tried in every.values()))
    told = f"The times are of one thread each, {whole} together; fine-tunings that several claims share count for the first of them."
    return _table(["claim", "what it says", "verdict", "time"], lines) + "\n\n" + told


def _section(tried: Tried, figures: Mapping[str, bytes]) -> str:
    claim, finding = tried.claim, tried.finding
    source = f"*Source:* {_plain(claim.source)}. *It says:* {_plain(claim.number)}."
    parts = [f"## {claim.name}", _plain(claim.sentence), source]
    if finding is None:
        return "\n\n".join([*parts, f"**Could not be tried**: {_plain(tried.failed)}"])
    parts += [f"**{finding.verdict.capitalize()}.** {_plain(finding.said)}"]
    if finding.picture is not None and _file(claim.name, False) in figures:
        parts += [_image(claim.name, dark, _words(finding.picture)) for dark in (False, True)]
        leaves = " One that leaves the picture is worse there than no training." * _leaves(finding.picture)
        parts.append(f"A line is the mean over the seeds, and the band around it is where they lie.{leaves}")
    if finding.rows:
        columns, rows = table(finding.rows)
        heads = [_plain(name) for name in (next(iter(finding.rows[0])), *columns)]
        parts.append(_table(heads, [[_plain(text) for text in (row.name, *row.texts)] for row in rows]))
    steps = "" if claim.exact else f" {tried.steps} steps a fine-tuning,"
    parts.append(f"{{source}}`{tried.module}`:{steps} {_time(tried.seconds)} on one thread of {_plain(tried.place)}.")
    return "\n\n".join(parts)


def _image(name: str, dark: bool, words: str) -> str:
    alt = words.replace("\n", " ")
    look = "dark" if dark else "light"
    return f"```{{image}} {FIGURES}/{_file(name, dark)}\n:alt: {alt}\n:class: only-{look}\n```"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in every)


def _plain(text: str) -> str:
    """A text as Markdown that shows it sign by sign, on one line."""
    return re.sub(r"([\\`*_\[\]<>{}|#$~])", r"\\\1", " ".join(text.split()))


def _time(seconds: float) -> str:
    """With its unit, in minutes from two of them on."""
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"

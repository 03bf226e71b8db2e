"""Several runs as one page: their loss curves in one figure, what came of each, the settings that differ, and their answers.

Next file: ``report/frame.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from minilora.report import figures
from minilora.report.canvas import NARROW
from minilora.report.figures import measured
from minilora.report.frame import page, picture, section
from minilora.report.page import FULL, in_words
from minilora.report.tables import finite_pairs, html_table, html_text

__all__ = ["runs_page"]


def runs_page(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    results: Mapping[str, Sequence[str]],
    settings: Mapping[str, Sequence[str]],
    answers: Mapping[str, Mapping[str, str]],
    notes: Sequence[str] = (),
) -> str:
    """One self-contained HTML page, which needs nothing else; every text is escaped.

    Args:
        records: name of a run to the lines of its log. results, settings: name of a row to a text for each run.
        answers: prompt to who answered what. notes: lines for the end.
    """
    names = list(records)
    body = section("Loss", _curves(records))
    body += section("Results", _table(names, results))
    body += section("Settings that differ", _table(names, settings) or "<p>None.</p>")
    body += section("Answers", "".join(_answer(prompt, said) for prompt, said in answers.items()))
    body += "".join(f'<p class="soft">{html_text(note)}</p>' for note in notes)
    return page(f"{len(names)} runs side by side", " · ".join(names), (), body)


def _curves(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    said: list[str] = []
    points: list[tuple[float, float]] = []
    for name, lines in records.items():
        for what, key in (("training", "loss"), ("held out", "eval_loss")):
            if values := measured(lines, key):
                said.append(in_words(f"{name}, {what}", values))
                points += values
    words = "".join(f'<p class="soft">{html_text(text)}</p>' for text in said)
    if not finite_pairs(points):
        return words
    return picture("", " ".join(said), functools.partial(figures.runs_figure, records), FULL, NARROW) + words


def _table(names: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    if not rows:
        return ""
    return html_table(
        ["", *names], [(name, *texts) for name, texts in rows.items()], range(1, len(names) + 1), "scroll"
    )


def _answer(prompt: str, said: Mapping[str, str]) -> str:
    boxes = "".join(f'<div class="said"><b>{html_text(who)}</b>{html_text(text)}</div>' for who, text in said.items())
    return f'<p class="prompt">{html_text(prompt)}</p><div class="pair">{boxes}</div>'

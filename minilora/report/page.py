"""One training run, or two libraries side by side, as one HTML page that needs nothing else: no script, no font, no network.

Pictures are drawn by ``figures`` and stand in the page as inline SVG in its own colours; without matplotlib the page says so in a line and
has all the rest. ``render`` and ``as_page`` return the page; writing it to a disk is the business of ``files/io``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minilora.report import figures
from minilora.report.canvas import NARROW, WIDE
from minilora.report.figures import CURVES, measured, ranked
from minilora.report.frame import page, picture, section
from minilora.report.heatmap import beyond_scale
from minilora.report.lens import STYLE, lens_section
from minilora.report.tables import (
    Row,
    as_html,
    as_number,
    finite_pairs,
    html_table,
    html_text,
    human_bytes,
    short_number,
)

__all__ = ["as_page", "render"]

FULL, HALF = 10.9, 5.3  # inches of the whole page, and of its half


def render(run: Mapping[str, Any]) -> str:
    """Draw a training run as one self-contained HTML page.

    Only `title` is required. A section whose key is missing or empty is not drawn; other keys are ignored. Every text
    is escaped, so prompts and answers may hold anything. Numbers that are not finite are left out of the pictures as
    gaps and named in a line of text; `None` in a step means "not measured here" and leaves no gap.

    Args:
        run: a mapping with
            title, subtitle: str.
            headline: list of {label, value}, str: the tiles on top.
            steps: list of {step, loss (nats per token), lr, tokens_per_s, rss_mb (MB, resident memory), grad_norm (L2),
                seconds (accepted, not drawn)}, in the order of training; a missing measure loses only its own curve.
            evals: list of {step, loss (nats per token; None for one that was not finite), prompt: str or None, answer: str or None}.
            answers: list of {prompt, before, after}, str.
            lenses: list of examples token by token, as ``lens.lens_section`` takes them.
            memory: list of {name, bytes (int), note}; shown in powers of 1000.
            parameters: list of {name, total (count), trainable (count), bits (per parameter)}.
            layers: list of {path (dotted module path), ratio (Frobenius norm of the update over that of the weight)}.
            spectrum: list of {path, values (singular values of the update, largest first)}.
            settings, versions: mapping of str to str or number.

    Returns:
        The page as text, to be written as UTF-8.

    Raises:
        ValueError: `run` has no title.
    """
    if not run.get("title"):
        raise ValueError(f"a report needs run['title'], a text; got the keys {sorted(run)}")
    drawn = (_curves, _evals, _answers, _lenses, _memory, _parameters, _layers, _spectrum, _settings)
    sections = "".join(part(run) for part in drawn)
    body = sections or ("" if run.get("headline") else '<p class="soft">This run recorded nothing to draw.</p>')
    style = STYLE if run.get("lenses") else ""
    return page(run["title"], run.get("subtitle") or "", run.get("headline") or (), body, style)


def as_page(
    title: str, subtitle: str, headline: Sequence[Mapping[str, str]], columns: Sequence[str], rows: Sequence[Row],
    notes: Sequence[str], losses: Mapping[str, Sequence[float]] | None = None, settings: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """A table and its bars as one HTML page, with the ``losses`` of each step by name, and the settings."""
    pairs = [(row.name.strip(), value) for row in rows for value in row.values if value is not None]
    says = "Bars: " + ", ".join(
        f"{row.name.strip()} {' and '.join(filter(None, row.texts))}" for row in rows if row.values
    )
    draw = functools.partial(figures.bar_figure, columns, rows)
    bars = _drawn("", says, draw, pairs, WIDE, NARROW) if pairs else ""
    words = "".join(f"<p>{html_text(note)}</p>" for note in notes)
    body = section("Side by side", bars + as_html(columns, rows) + f"<p></p>{words}")
    if losses:
        lines = {name: ranked(values) for name, values in losses.items()}
        says = "Loss by optimizer step. " + " ".join(in_words(name, points) for name, points in lines.items())
        every = [point for points in lines.values() for point in points]
        draw = functools.partial(figures.compare_figure, losses)
        body += section("The same losses", _drawn("Loss", says, draw, every, WIDE, NARROW))
    body += section("Settings", html_table(["setting", ""], settings.items())) if settings else ""
    return page(title, subtitle, headline, body)


# ---- the sections, in the order of the page


def _curves(run: Mapping[str, Any]) -> str:
    steps = run.get("steps") or ()
    if not steps:
        return ""
    records = [*steps, *({"step": entry["step"], "eval_loss": entry["loss"]} for entry in run.get("evals") or ())]
    lines = {"training": measured(records, "loss"), "evaluation": measured(records, "eval_loss")}
    said = [f"Loss, {in_words(name, points)}" for name, points in lines.items() if points]
    notes = "".join(f'<p class="soft">{html_text(words)}</p>' for words in said)
    notes += gaps_in_words("Training loss", lines["training"]) + gaps_in_words("Evaluation loss", lines["evaluation"])
    draw = functools.partial(figures.loss_figure, records)
    body = _drawn("Loss", " ".join(said), draw, [*lines["training"], *lines["evaluation"]], WIDE, NARROW)
    for key, (heading, _) in CURVES.items():
        if points := measured(steps, key):
            draw = functools.partial(figures.curve_figure, steps, key)
            body += _drawn(heading, in_words(heading, points), draw, points, NARROW)
            notes += gaps_in_words(heading, points)
    return section("Training", f'<div class="curves">{body}<div>{notes}</div></div>')


def _drawn(
    heading: str,
    words: str,
    draw: Callable[..., Any],
    pairs: Sequence[tuple[Any, float]],
    width: float,
    phone: float | None = None,
) -> str:
    if finite_pairs(pairs):
        return picture(heading, words, draw, width, phone)
    return f"<figure><figcaption><b>{html_text(heading)}</b></figcaption><p>nothing here can be drawn</p></figure>"


def _evals(run: Mapping[str, Any]) -> str:
    evals, lead = run.get("evals") or (), ""
    columns = [name for name in ("prompt", "answer") if any(entry.get(name) for entry in evals)]
    prompts = {entry.get("prompt") for entry in evals}
    if len(prompts) == 1 and "prompt" in columns:  # one prompt asked again and again: said once, above the table
        columns.remove("prompt")
        lead = f'<p class="prompt">{html_text(*prompts)}</p>'
    rows = [(f"{e['step']:,}", _loss(e["loss"]), *(e.get(c) or "" for c in columns)) for e in evals]
    heading = "How the answer changed while training" if columns else "Evaluations"
    return section(heading, rows and lead + html_table(["step", "loss", *columns], rows, numeric=(0, 1)))


def _loss(value: float | None) -> str:
    return "not finite" if value is None else short_number(as_number(value))


def _answers(run: Mapping[str, Any]) -> str:
    body = ""
    for answer in run.get("answers") or ():
        before, after = html_text(answer["before"]), html_text(answer["after"])
        body += f'<p class="prompt">{html_text(answer["prompt"])}</p><div class="pair">'
        body += f'<div class="said"><b>before</b>{before}</div><div class="said after"><b>after</b>{after}</div></div>'
    return section("Before and after", body)


def _lenses(run: Mapping[str, Any]) -> str:
    lead = "Examples as the model reads them, token by token, with the loss of each before training and after it."
    return lens_section("What it learnt from", run.get("lenses") or (), lead)


def _memory(run: Mapping[str, Any]) -> str:
    entries = run.get("memory") or ()
    sizes = [(str(entry["name"]), as_number(entry["bytes"])) for entry in entries]
    rows = [
        (name, human_bytes(size), entry.get("note") or "") for (name, size), entry in zip(sizes, entries, strict=True)
    ]
    if not rows:
        return ""
    says = "Bars of memory: " + ", ".join(f"{name} {size}" for name, size, _ in rows)
    bars = _drawn("", says, functools.partial(figures.memory_figure, entries), sizes, HALF, NARROW)
    table = html_table(["what", "size", "note"], rows, numeric=(1,))
    return section("Memory", f'<div class="beside">{bars}{table}</div>', "KB, MB and GB are powers of 1000 bytes.")


def _parameters(run: Mapping[str, Any]) -> str:
    rows = []
    for entry in run.get("parameters") or ():
        total, trainable = entry["total"], entry["trainable"]
        share = f"{100 * trainable / total:.3g} %" if total else "–"
        rows.append((entry["name"], f"{total:,}", f"{trainable:,}", share, f"{entry['bits']:.4g}"))
    heads = ["part", "parameters", "trainable", "share", "bits"]
    lead = "The share of them that trains, and the bits that one takes in memory."
    return section("Parameters", rows and html_table(heads, rows, numeric=(1, 2, 3, 4)), lead)


def _layers(run: Mapping[str, Any]) -> str:
    layers = [(str(layer["path"]), as_number(layer["ratio"])) for layer in run.get("layers") or ()]
    if not layers:
        return ""
    words, seen = gaps_in_words("Ratio", layers), finite_pairs(layers)
    says = f"‖ΔW‖ / ‖W‖ of {len(layers)} layers"
    if seen:
        (low, least), (high, most) = (end(seen, key=lambda layer: layer[1]) for end in (min, max))
        extremes = f"Most: {high} ({short_number(most)}). Least: {low} ({short_number(least)})."
        words, says = words + f"<p>{html_text(extremes)}</p>", f"{says}. {extremes}"
        if beyond := beyond_scale(layers):
            some, more = ", ".join(beyond[:5]), f" and {len(beyond) - 5:,} more" * (len(beyond) > 5)
            words += f"<p>Far beyond the rest, and outside the scale of colours: {html_text(some)}{more}.</p>"
    chart = _drawn("", says, functools.partial(figures.layer_figure, dict(layers)), layers, FULL, NARROW)
    lead = "‖ΔW‖ / ‖W‖: the Frobenius norm of each update, relative to that of the weight it changes."
    return section("How far each layer moved", chart + words, lead)


def _spectrum(run: Mapping[str, Any]) -> str:
    values = {str(layer["path"]): ranked(layer["values"]) for layer in run.get("spectrum") or ()}
    if not values:
        return ""
    notes = "".join(gaps_in_words(path, points, log=True) for path, points in values.items())
    drawn = [point for points in values.values() for point in points if point[1] > 0]
    says = "Singular values by rank. " + " ".join(in_words(path, points) for path, points in values.items())
    draw = functools.partial(
        figures.spectrum_figure, {path: [value for _, value in points] for path, points in values.items()}
    )
    lead = "A line that falls early: the update uses fewer directions than its rank allows."
    return section(
        "Spectrum of the updates", _drawn("Singular values of ΔW", says, draw, drawn, WIDE, NARROW) + notes, lead
    )


def _settings(run: Mapping[str, Any]) -> str:
    named = [name for name in ("settings", "versions") if run.get(name)]
    tables = "".join(html_table([name, ""], run[name].items()) for name in named)
    return section("Settings and versions", tables and f'<div class="pair">{tables}</div>')


# ---- curves in words


def in_words(name: str, points: Sequence[tuple[float, float]]) -> str:
    """Where a line begins and ends, its lowest and its highest point."""
    if not (seen := finite_pairs(points)):
        return f"{name}: no finite value."
    low, high = (end(seen, key=lambda point: point[1]) for end in (min, max))
    spots = ("first", seen[0]), ("last", seen[-1]), ("lowest", low), ("highest", high)
    return f"{name}: " + ", ".join(f"{word} {short_number(value)} at {at:,.0f}" for word, (at, value) in spots) + "."


def gaps_in_words(what: str, points: Sequence[tuple[Any, float]], log: bool = False) -> str:
    """Name the values that a picture leaves out."""
    bad = [(where, value) for where, value in points if not math.isfinite(value) or (log and value <= 0)]
    if not bad:
        return ""
    some = ", ".join(f"{value:g} at {where if isinstance(where, str) else int(where)}" for where, value in bad[:5])
    more = f" and {len(bad) - 5:,} more" if len(bad) > 5 else ""
    return f'<p class="warn">{html_text(what)}: {len(bad):,} of {len(points):,} not drawn: {html_text(some)}{more}.</p>'

"""What people look at after a sweep: ``report.html`` in its folder, and a table for a terminal.

    sweep_report("sweeps/mine")                 # from runs.csv alone, today or in a year
    print(sweep_text(read_table(as_csv(results))))

The page needs nothing else; without matplotlib it has the words and the table, and says so. Next file: ``report/sweep_figures.py``.
"""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError, ConfigError
from minilora.files.read import read_bytes
from minilora.files.write import write_file
from minilora.lab.sweeps.left import CSV_FILE, FIGURES, KINDS, REPORT_FILE
from minilora.lab.sweeps.table import as_csv
from minilora.lab.sweeps.trial import Result
from minilora.lab.verdicts.groups import Family, Group, Outcome, Outcomes, families_of, rank, read_table
from minilora.lab.verdicts.interval import told_apart
from minilora.lab.verdicts.verdict import closing, shown_difference, shown_ends, shown_loss, verdict
from minilora.report.canvas import NARROW
from minilora.report.frame import page, picture, section
from minilora.report.frontier import frontier_figure
from minilora.report.page import FULL, HALF
from minilora.report.sweep_figures import rate_figure, regret_figure
from minilora.report.tables import Row, as_text, html_table, html_text, short_number

__all__ = ["sweep_page", "sweep_report", "sweep_text"]

LABELS = {"eval_loss": "evaluation loss (nats per token)", "loss": "training loss (nats per token)"}
FORGETTING = "forgetting"  # what ``measure`` calls the nats a token that other text became worse by
HEADINGS = dict(zip(FIGURES, ("", "Distance to the best", "Learnt and forgotten"), strict=True))
MANY = 6  # families, of more the figures are as wide as the page


def sweep_report(folder: str | os.PathLike[str], results: Sequence[Result] | None = None, figures: str = "") -> Path:
    """Write ``report.html`` into a sweep's folder.

    Args:
        results: what ``sweep`` returned; None reads ``runs.csv`` there, which holds the same. figures: "png", "svg" or "pdf" writes each
            figure as a file, too.

    Returns:
        The page's path.

    Raises:
        CheckpointError: ``runs.csv`` is missing or damaged. ConfigError: another kind of figures, or no trial has a loss to draw.
        MissingPackageError: figures are asked for, and matplotlib is missing. WriteError: as ``files.write``.
    """
    if figures not in ("", *KINDS):
        raise ConfigError(f"figures={figures!r}; wanted one of {', '.join(KINDS)}, or nothing")
    place = Path(folder)
    outcomes = _read(place / CSV_FILE) if results is None else read_table(as_csv(results))
    drawn = {name: _file(draw, figures) for name, (draw, _) in _figures(outcomes).items()} if figures else {}
    for name, content in drawn.items():
        write_file(place / f"{name}.{figures}", content)
    write_file(place / REPORT_FILE, sweep_page(outcomes))
    return place / REPORT_FILE


def _read(path: Path) -> Outcomes:
    try:
        return read_table(read_bytes(path, "the table of a sweep").decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: damaged ({error}); restore it") from None


def _file(draw: Callable[..., Any], kind: str) -> bytes:
    file = io.BytesIO()
    draw().savefig(file, format=kind, dpi=200)
    return file.getvalue()


def sweep_text(outcomes: Outcomes) -> str:
    """The groups as a table, the lowest loss first, and the verdict below."""
    columns, rows = _table(outcomes)
    return "\n".join(
        [as_text(columns, [Row(name, texts) for name, *texts in rows], bars=False), "", *closing(outcomes)]
    )


def sweep_page(outcomes: Outcomes) -> str:
    """The page as text, to be written as UTF-8."""
    families, trials = families_of(outcomes), outcomes.trials
    first, *rest = closing(outcomes)
    words = f"<p><b>{html_text(first)}</b></p>" + "".join(f"<p>{html_text(line)}</p>" for line in rest)
    columns, rows = _table(outcomes)
    lead = "A row is the trials that differ in the seed only, the lowest mean first; those of which a seed diverged follow. An interval is "
    lead += "Student's of 95 % over the seeds; the difference to the best is of equal seeds. Each comparison stands by itself: where there "
    lead += "is no difference, one in twenty finds one all the same. The best rates were chosen by the same seeds."
    body = section("Verdict", words)
    body += _pictures(outcomes)
    body += section("All that was tried", html_table(["", *columns], rows, range(1, len(columns) + 1)), lead)
    body += section("What ran together", _together(trials))
    body += section("Trials that did not end", _ended(trials))
    rates = {group.rate for family in families for group in family.groups}
    seeds = {trial.settings["seed"] for trial in trials}
    counts = (
        _count(len(families), "family", "families"),
        _count(len(rates), "learning rate"),
        _count(len(seeds), "seed"),
    )
    return page(f"A sweep of {_count(len(trials), 'trial')}", ", ".join(counts), _tiles(outcomes, families), body)


def _count(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _tiles(outcomes: Outcomes, families: Sequence[Family]) -> list[dict[str, str]]:
    trials, best = outcomes.trials, verdict(families).best
    told = {"came to their end": sum(not trial.fate for trial in trials)}
    told |= {"diverged": sum(trial.fate == "diverged" for trial in trials)}
    told |= {"refused": sum(trial.fate == "refused" for trial in trials), "go": sum(t.fate == "goes" for t in trials)}
    tiles = [{"label": name, "value": f"{count:,}"} for name, count in told.items() if count]
    tiles.append({"label": "time of the steps", "value": f"{sum(trial.seconds for trial in trials):,.0f} s"})
    if best and best.interval:
        low = {"label": "lowest mean loss", "value": shown_loss(best.interval.mean)}
        tiles = [
            {"label": "best", "value": best.family},
            {"label": "its rate", "value": short_number(best.rate)},
            low,
            *tiles,
        ]
    return tiles


# ---- figures


def _losses(families: Sequence[Family]) -> dict[str, dict[float, list[float]]]:
    """Name to rate to the loss of each seed; NaN for one that diverged."""
    found = {
        family.name: {g.rate: [*g.losses.values(), *[math.nan] * g.diverged] for g in family.groups if g.tried}
        for family in families
    }
    return {name: rates for name, rates in found.items() if rates}


def _forgotten(families: Sequence[Family]) -> dict[str, list[tuple[float, float, str]]]:
    found: dict[str, list[tuple[float, float, str]]] = {}
    for family in families:
        for group in family.groups:
            forgotten = group.measured(FORGETTING)
            if forgotten and group.interval:
                point = (forgotten.mean, group.interval.mean, f"lr={short_number(group.rate)}")
                found.setdefault(family.name, []).append(point)
    return found


def _figures(outcomes: Outcomes) -> dict[str, tuple[Callable[..., Any], str]]:
    """The figures that can be drawn, by the name of their file; and each in words."""
    families, label = families_of(outcomes), LABELS[outcomes.by]
    if not any(family.best for family in families):
        return {}
    losses, points = _losses(families), _forgotten(families)
    best = [family.best for family in families if family.best]
    each = ", ".join(f"{g.family} {shown_loss(g.interval.mean)} at {short_number(g.rate)}" for g in best if g.interval)
    rates, regret, frontier = FIGURES
    made: dict[str, tuple[Callable[..., Any], str]] = {
        rates: (functools.partial(rate_figure, losses, label=label), f"{label} by learning rate. Lowest: {each}."),
    }
    if sum(group.interval is not None for family in families for group in family.groups) > 1:
        made[regret] = (functools.partial(regret_figure, losses), f"Distance to the best. Lowest losses: {each}.")
    if points:
        told = ", ".join(f"{name} {what} {short_number(x)}" for name, own in points.items() for x, _, what in own)
        made[frontier] = (
            functools.partial(frontier_figure, points, label=label),
            f"Forgotten, nats per token: {told}.",
        )
    return made


def _pictures(outcomes: Outcomes) -> str:
    found = _figures(outcomes)
    if not found:
        return ""
    beside = len(found) == len(FIGURES) and len(families_of(outcomes)) <= MANY
    (draw, words), *others = found.values()
    first, side = picture("", words, draw, FULL, NARROW), HALF if beside else FULL
    names = [name for name in FIGURES if name in found][1:]
    rest = "".join(
        picture(HEADINGS[n], words, draw, side, NARROW) for n, (draw, words) in zip(names, others, strict=True)
    )
    rest = f'<div class="beside">{rest}</div>' if beside and rest else rest
    lead = "The mean over the seeds, in a band from the lowest seed to the highest."
    heading = "How near, and what was forgotten" if FIGURES[-1] in found else "How near"
    return section("Loss by learning rate", first, lead if first else "") + section(heading, rest)


# ---- tables


def _table(outcomes: Outcomes) -> tuple[list[str], list[list[str]]]:
    """The columns, and a row for each group: its name and a text for each column."""
    families = families_of(outcomes)
    best = verdict(families).best
    groups = sorted((group for family in families for group in family.groups), key=rank)
    measured = list(dict.fromkeys(name for trial in outcomes.trials for name in trial.measured))
    columns = [
        "rate",
        LABELS[outcomes.by].split(" (")[0],
        "95 % interval",
        "above the best",
        "seeds",
        *measured,
        "parameters",
        "s a trial",
    ]
    return columns, [_row(group, best, measured) for group in groups]


def _row(group: Group, best: Group | None, measured: Sequence[str]) -> list[str]:
    loss, ends = group.interval, ""
    if loss:
        ends = shown_ends(loss) if loss.count > 1 else "one seed"
    fates = list(dict.fromkeys(trial.fate for trial in group.trials if trial.fate))
    above = (
        ""
        if best is None or not loss
        else "-"
        if group is best
        else shown_difference(told_apart(best.losses, group.losses))
    )
    found = [group.measured(name) for name in measured]
    seeds = str(len(group.losses)) if group.tried == len(group.losses) else f"{len(group.losses)} of {group.tried}"
    mean = sum(trial.seconds for trial in group.trials) / len(group.trials)
    texts = [short_number(group.rate), shown_loss(loss.mean) if loss else " and ".join(fates), ends, above, seeds]
    texts += [short_number(one.mean, ".3g") if one else "" for one in found]
    return [group.family, *texts, f"{max(trial.parameters for trial in group.trials):,}", f"{mean:.3g}"]


def _together(trials: Sequence[Outcome]) -> str:
    """How many shared a pass, and why the others did not."""
    alone: dict[str, list[str]] = {}
    for trial in trials:
        if trial.alone:
            alone.setdefault(trial.alone, []).append(trial.name)
    count = len(trials) - sum(map(len, alone.values()))
    words = f"<p>{count:,} of {_count(len(trials), 'trial')} went through the model together, as rows of one batch.</p>"
    rows = [(why, f"{len(names):,}", " ".join(names)) for why, names in alone.items()]
    return words + (html_table(["one after another, because", "trials", "which"], rows, (1,)) if rows else "")


def _ended(trials: Sequence[Outcome]) -> str:
    rows = [(t.name, _settings(t), t.ended if t.fate == "goes" else f"{t.fate}: {t.ended}") for t in trials if t.fate]
    return html_table(["trial", "settings", "why"], rows) if rows else ""


def _settings(trial: Outcome) -> str:
    return " ".join(f"{name}={value}" for name, value in trial.settings.items() if value)

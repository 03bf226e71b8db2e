"""One training run as one HTML page that needs nothing else: no script, no font, no image, no network.

Every picture is inline SVG, coloured by CSS variables so that light and dark follow the reader's system.
`render` returns the page; writing it to a disk is the business of `io`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from minilora.report.pictures import (
    LAYER_INDEX,
    SMALL,
    WIDE,
    Line,
    as_number,
    bar_table,
    finite_pairs,
    gaps_in_words,
    heat_map,
    html_section,
    html_table,
    html_text,
    human_bytes,
    in_words,
    line_chart,
    points_of,
    short_number,
    smoothed,
)

STEP = "optimizer step"
CURVES = (  # key of a step, heading, label of the y axis
    ("lr", "Learning rate", "lr, without unit"),
    ("grad_norm", "Gradient norm", "L2 norm, all trained parameters"),
    ("tokens_per_s", "Throughput", "tokens per second"),
    ("rss_mb", "Memory of the process", "resident memory (MB)"),
)

STYLE = """
:root{color-scheme:light dark;--page:#fcfcfb;--card:#f3f4f3;--ink:#1b1e22;--soft:#5b636d;--line:#dde0e4;--c0:#0072b2;
--c1:#c25400;--c2:#00825f;--c3:#b04a88;--c4:#8a6d00;--c5:#5b636d}
@media(prefers-color-scheme:dark){:root{--page:#14161a;--card:#1d2026;--ink:#e7e9ec;--soft:#a3abb5;--line:#31363e;
--c0:#56b4e9;--c1:#f0903c;--c2:#2fc79b;--c3:#e29bc4;--c4:#f0e442;--c5:#a3abb5}}*{box-sizing:border-box}
body{margin:0 auto;max-width:1100px;padding:28px 24px 48px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:28px;line-height:1.2;margin:0}h2{font-size:19px;margin:0 0 4px}p{margin:0 0 10px}
.soft,figcaption,th{color:var(--soft)}.warn{color:var(--c1);font-weight:600}
section{margin-top:32px;padding-top:20px;border-top:1px solid var(--line)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:20px}
.tiles div{background:var(--card);border-radius:8px;padding:10px 14px}.tiles b{display:block;font-size:18px}
.curves{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:20px 24px}.wide{grid-area:span 2/span 2}
.pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px 32px;align-items:start;margin-bottom:16px}
figure{margin:0;min-width:0;overflow-x:auto}figcaption{font-size:13px}figcaption b{color:var(--ink);margin-right:8px}
.key{margin-right:12px;display:inline-block}
.key:before{content:"";display:inline-block;width:16px;margin-right:5px;vertical-align:middle;
border-top:3px solid var(--c)}.key.thin:before{border-top-width:1px}.key.dash:before{border-top-style:dashed}
.key.dots:before{border:0;width:9px;height:9px;border-radius:50%;background:var(--c)}
svg{display:block;width:100%;font-size:12px}text{fill:var(--soft)}text[text-anchor=end]{dominant-baseline:central}.grid{stroke:var(--line)}
path{fill:none;stroke:var(--c);stroke-linecap:round;stroke-linejoin:round;stroke-width:2.2}
path.thin{stroke-width:1;opacity:.55}path.dash{stroke-dasharray:6 5}
circle{fill:var(--c);stroke:var(--page);stroke-width:1.5}.hole{fill:none;stroke:var(--soft);stroke-dasharray:3 3}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.curves figure:not(.wide) path{stroke-width:1.4}
.scroll{overflow:auto;max-height:620px}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;vertical-align:top;padding:5px 14px 5px 0;border-bottom:1px solid var(--line)}
td,.said,.prompt{white-space:pre-wrap}th{font-weight:500;font-size:13px}
td:first-child:not(.num){min-width:8.5em}th{overflow-wrap:normal}
.num{text-align:right;font-variant-numeric:tabular-nums}td.num{white-space:nowrap;overflow-wrap:normal}
.bar{height:12px;margin:5px 0 2px;border-radius:2px;min-width:1px;background:var(--c,var(--c0))}
.bars{width:40%;min-width:140px}.tall{max-height:none}
.said{background:var(--card);border-radius:8px;padding:10px 14px}.after{box-shadow:inset 3px 0 var(--c0)}
.said b{display:block;font-size:13px;color:var(--soft);font-weight:500}.prompt{margin:14px 0 8px;font-weight:600}
@media(max-width:720px){body{padding:18px 16px 32px}.pair,.curves{grid-template-columns:minmax(0,1fr)}
.tiles{grid-template-columns:1fr 1fr}.wide{grid-area:auto}svg{font-size:var(--phone-font);
min-width:var(--phone-width)}}@media print{.scroll{max-height:none}}
"""


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
            evals: list of {step, loss (nats per token), prompt: str or None, answer: str or None}.
            answers: list of {prompt, before, after}, str.
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
    drawn = (_curves, _evals, _answers, _memory, _parameters, _layers, _spectrum, _settings)
    sections = "".join(section(run) for section in drawn)
    body = sections or ("" if run.get("headline") else '<p class="soft">This run recorded nothing to draw.</p>')
    return page(run["title"], run.get("subtitle") or "", run.get("headline") or (), body)


def page(title: str, subtitle: str, headline: Iterable[Mapping[str, Any]], body: str) -> str:
    """One self-contained HTML page: texts, tiles of {label, value}, and ``body``, which is HTML already."""
    tiles = "".join(
        f'<div><span class="soft">{html_text(tile["label"])}</span><b>{html_text(tile["value"])}</b></div>'
        for tile in headline
    )
    title = html_text(title)
    under = f'<p class="soft">{html_text(subtitle)}</p>' if subtitle else ""
    # The policy makes the browser itself refuse whatever would leave the page, should an escape ever be forgotten.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><header><h1>{title}</h1>{under}</header>"
        + (f'<div class="tiles">{tiles}</div>' if tiles else "")
        + body
        + "\n</body></html>\n"
    )


# ---- the sections, in the order of the page


def _curves(run: Mapping[str, Any]) -> str:
    steps, evals = run.get("steps") or (), points_of(run.get("evals") or (), "loss")
    if not steps:
        return ""
    losses = points_of(steps, "loss")
    span = min(101, max(5, len(losses) // 25 | 1))  # odd: as many steps before as after
    smooth = smoothed(losses, span) if len(losses) > 2 * span else []
    lines = [Line("training, each step", losses, "c0 thin" if smooth else "c0")]
    lines += [Line(f"mean of {span} steps", smooth, "c0")] * bool(smooth)
    lines += [Line("evaluation", evals, "c1 dots")] * bool(evals)
    pictures = [line_chart("Loss", lines, (STEP, "loss (nats per token)"), (WIDE, 400))]
    notes = [f'<p class="soft">Loss, {html_text(in_words(line))}</p>' for line in lines if line.points is not smooth]
    notes += [gaps_in_words("Training loss", losses), gaps_in_words("Evaluation loss", evals)]
    for key, heading, label in CURVES:
        if points := points_of(steps, key):
            pictures.append(line_chart(heading, [Line(heading, points, "c0")], (STEP, label), (SMALL, 190)))
            notes.append(gaps_in_words(heading, points))
    return html_section("Training", f'<div class="curves">{"".join(pictures)}<div>{"".join(notes)}</div></div>')


def _evals(run: Mapping[str, Any]) -> str:
    evals, lead = run.get("evals") or (), ""
    columns = [name for name in ("prompt", "answer") if any(entry.get(name) for entry in evals)]
    prompts = {entry.get("prompt") for entry in evals}
    if len(prompts) == 1 and "prompt" in columns:  # one prompt asked again and again: said once, above the table
        columns.remove("prompt")
        lead = f'<p class="prompt">{html_text(*prompts)}</p>'
    rows = [(f"{e['step']:,}", short_number(as_number(e["loss"])), *(e.get(c) or "" for c in columns)) for e in evals]
    heading = "How the answer changed while training" if columns else "Evaluations"
    return html_section(heading, rows and lead + html_table(["step", "loss", *columns], rows, numeric=(0, 1)))


def _answers(run: Mapping[str, Any]) -> str:
    body = ""
    for answer in run.get("answers") or ():
        before, after = html_text(answer["before"]), html_text(answer["after"])
        body += f'<p class="prompt">{html_text(answer["prompt"])}</p><div class="pair">'
        body += f'<div class="said"><b>before</b>{before}</div><div class="said after"><b>after</b>{after}</div></div>'
    return html_section("Before and after", body)


def _memory(run: Mapping[str, Any]) -> str:
    sizes = [(entry["name"], as_number(entry["bytes"]), entry.get("note") or "") for entry in run.get("memory") or ()]
    rows = [(name, size, human_bytes(size), note) for name, size, note in sizes]
    heads = ["what", "size", "note"]
    return html_section("Memory", rows and bar_table(heads, rows), "KB, MB and GB are powers of 1000 bytes.")


def _parameters(run: Mapping[str, Any]) -> str:
    rows = []
    for entry in run.get("parameters") or ():
        total, trainable = entry["total"], entry["trainable"]
        share = f"{100 * trainable / total:.3g} %" if total else "–"
        rows.append((entry["name"], f"{total:,}", f"{trainable:,}", share, f"{entry['bits']:.4g}"))
    heads = ["part", "parameters", "trainable", "trainable share", "bits per parameter"]
    return html_section("Parameters", rows and html_table(heads, rows, numeric=(1, 2, 3, 4)))


def _layers(run: Mapping[str, Any]) -> str:
    layers = [(str(layer["path"]), as_number(layer["ratio"])) for layer in run.get("layers") or ()]
    if not layers:
        return ""
    if any(LAYER_INDEX.search(path) for path, _ in layers):
        picture = heat_map(layers)
    else:
        picture = bar_table(["layer", "‖ΔW‖ / ‖W‖"], [(path, ratio, short_number(ratio)) for path, ratio in layers])
    words = gaps_in_words("Ratio", layers)
    if seen := finite_pairs(layers):
        (low, least), (high, most) = (end(seen, key=lambda layer: layer[1]) for end in (min, max))
        words += (
            f"<p>Most: {html_text(high)} ({short_number(most)}). Least: {html_text(low)} ({short_number(least)}).</p>"
        )
    lead = "‖ΔW‖ / ‖W‖: the Frobenius norm of each update, relative to that of the weight it changes."
    return html_section("How far each layer moved", picture + words, lead)


def _spectrum(run: Mapping[str, Any]) -> str:
    lines, notes = [], ""
    for index, layer in enumerate(run.get("spectrum") or ()):
        points = [(float(rank), as_number(value)) for rank, value in enumerate(layer["values"], 1)]
        shown = [(rank, value if value > 0 else math.nan) for rank, value in points]  # a log axis has no zero
        lines.append(Line(str(layer["path"]), shown, f"c{index % 6}" + " dash" * (index // 6 % 2)))
        notes += gaps_in_words(layer["path"], points, log=True)
    if not lines:
        return ""
    labels = ("rank, largest first", "singular value, log scale")
    chart = line_chart("Singular values of ΔW", lines, labels, (WIDE, 340), log=True)
    lead = "A line that falls early: the update uses fewer directions than its rank allows."
    return html_section("Spectrum of the updates", chart + notes, lead)


def _settings(run: Mapping[str, Any]) -> str:
    named = [name for name in ("settings", "versions") if run.get(name)]
    tables = "".join(html_table([name, ""], run[name].items()) for name in named)
    return html_section("Settings and versions", tables and f'<div class="pair">{tables}</div>')

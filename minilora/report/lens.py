"""Examples token by token as a part of a page: colours by loss, marks for what counts and what was cut, and a line of details.

No script: the tokens of an example are radio buttons, so Tab goes to the example, arrow keys go from token to token, and a finger or a
mouse takes any; the details of the chosen one stand at the foot of the window. A table below has the same numbers.
Next file: ``report/frame.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

from minilora.report.frame import section
from minilora.report.tables import html_table, html_text

__all__ = ["MOST", "STYLE", "header", "lens_section", "level", "number", "seen", "state", "window"]

MOST = 200  # tokens of an example that a page shows
_EDGES = (0.1, 0.5, 1.0, 2.0, 4.0)  # nats, where one colour ends and the next one begins
_SHARES = (0, 10, 20, 30, 40, 50)  # per cent of the colour in each
_VISIBLE = str.maketrans({" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽"})
_SIGNS = ("· space", "↵ line end", "⇥ tab", "� a part of a letter")


def _tint(share: int) -> str:
    return f"background:color-mix(in srgb,var(--c1) {share}%,transparent)"


STYLE = (
    """
.key{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:baseline;font-size:13px}.key span,.key s,.key u{padding:1px 6px;border-radius:3px}
.hue{border:0;margin:0 0 8px;padding:0;font-size:13px}.hue label{margin-right:14px}
.turns{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:6px 16px;margin:8px 0 10px;
background:var(--card);border-radius:8px;padding:12px 14px}.turns>b{font-size:13px;font-weight:500;color:var(--soft)}
.tk input{position:absolute;opacity:0;width:1px;height:1px;margin:0;scroll-margin:90px}
.tk span{display:inline-block;max-width:100%;padding:0 1px;margin:1px 1px 1px 0;border-radius:3px;line-height:1.5;
white-space:pre-wrap;unicode-bidi:isolate;cursor:pointer}
.on span,.key u{text-decoration:none;border-bottom:2px solid var(--ink)}.cut span,.key s{text-decoration:line-through 2px;color:var(--soft)}
.tk input:checked+span{box-shadow:0 0 0 1px var(--soft)}.tk input:focus+span,.tk:hover span{box-shadow:0 0 0 2px var(--c0)}
.tk i{display:none;position:fixed;left:0;right:0;bottom:0;z-index:1;padding:10px 24px;background:var(--ink);color:var(--page);
font-style:normal;line-height:1.5;text-align:center}.tk:hover i,.tk input:focus~i{display:block}.tk:hover i{z-index:2}
.lens td{white-space:nowrap}.lens td:nth-child(2){white-space:pre-wrap;min-width:8em}
details{margin-bottom:22px}summary{cursor:pointer;font-size:13px;color:var(--soft);padding:4px 0}
@media(max-width:760px){.turns{grid-template-columns:minmax(0,1fr);gap:0 0}.turns>b{margin-top:4px}.tk i{padding:10px 16px}}
"""
    + "".join(f".a{place}{{{_tint(share)}}}" for place, share in enumerate(_SHARES))
    + "".join(f".lens:has(.was:checked) .b{place}{{{_tint(share)}}}" for place, share in enumerate(_SHARES))
    + "\n"
)


def lens_section(heading: str, examples: Sequence[Mapping[str, Any]], lead: str, most: int = MOST) -> str:
    """A section with examples token by token; nothing where there are none. A page with it needs ``STYLE``; every text is escaped.

    Args:
        examples: each a mapping with
            where: str, file and line. kind: str, what it was for. number, count: which of the examples of its record it is.
            warning: str, "" for none.
            tokens: list of {text, name, id, role, counts, cut}, as ``data/lens.py`` has them. first: place of the first in its text.
            before, after: a loss for each token (nats; None where it has none); an empty list where none was computed.
        most: tokens of an example that are shown; around the first that counts.
    """
    body = "".join(_example(example, number, most) for number, example in enumerate(examples, 1))
    return section(heading, body and _key(examples) + body, lead)


def header(example: Mapping[str, Any]) -> str:
    """What an example is, in a line."""
    tokens = example["tokens"]
    kept, cut = (sum(token["cut"] == is_cut for token in tokens) for is_cut in (False, True))
    counts = sum(token["counts"] for token in tokens)
    part = f" (example {example['number']} of {example['count']} from it)" if example["count"] > 1 else ""
    means = [mean(example, name) for name in ("before", "after") if example[name]]
    loss = f"; their loss {' → '.join(means)}" if means else ""
    lost = f"; {cut:,} more were cut" if cut else ""
    kind = f", {example['kind']}" if example["kind"] else ""
    return f"{example['where'] or 'an example'}{kind}{part}: {kept:,} tokens, {counts:,} count{loss}{lost}"


def mean(example: Mapping[str, Any], name: str) -> str:
    """The mean loss of the tokens that count."""
    pairs = zip(example["tokens"], example[name], strict=True)
    own = [loss for token, loss in pairs if token["counts"] and loss is not None]
    return number(sum(own) / len(own)) if own else "none"


def number(loss: float | None) -> str:
    """A loss with two digits."""
    return "–" if loss is None else f"{loss:.2f}" if math.isfinite(loss) else "not finite"


def level(loss: float) -> int:
    """Which colour a loss has, from 0, none, to 5."""
    return sum(not loss < edge for edge in _EDGES)


def seen(text: str) -> str:
    """A token's text with its spaces and line ends shown."""
    return text.translate(_VISIBLE) or "∅"


def window(tokens: Sequence[Mapping[str, Any]], most: int) -> range:
    """Which tokens are shown: all, or ``most`` around the first that counts."""
    first = next((at for at, token in enumerate(tokens) if token["counts"]), 0)
    start = max(0, min(first - most // 4, len(tokens) - most))
    return range(start, min(len(tokens), start + most))


# ---- what the colours and marks mean


def _key(examples: Sequence[Mapping[str, Any]]) -> str:
    every = [token for example in examples for token in example["tokens"]]
    parts = ["<u>counts in the loss</u>"] + ["<s>cut: in no example</s>"] * any(token["cut"] for token in every)
    if any(example["before"] or example["after"] for example in examples):
        edges = [f"{edge:g}" for edge in _EDGES]
        names = [
            f"under {edges[0]}",
            *(f"{a} to {b}" for a, b in pairwise(edges)),
            f"{edges[-1]} or more",
        ]
        parts += ["loss in nats:", *(f'<span class="a{at}">{name}</span>' for at, name in enumerate(names))]
    some = [sign for sign in _SIGNS if any(sign[0] in seen(token["text"]) for token in every)]
    parts += [f"<span>{', '.join(some)}</span>"] * bool(some)
    return f'<p class="key">{" ".join(parts)}</p>'


# ---- an example


def _example(example: Mapping[str, Any], place: int, most: int) -> str:
    shown = window(example["tokens"], most)
    rows = groupby(shown, key=lambda at: example["tokens"][at]["role"])
    inner = "".join(
        f"<b>{html_text(role or 'tokens')}</b><div>{_row(example, list(own), place)}</div>" for role, own in rows
    )
    before, after = shown.start, len(example["tokens"]) - shown.stop
    inner = _left_out(before, "before them") + inner + _left_out(after, "after them")
    warning = f'<p class="warn">{html_text(example["warning"])}</p>' if example["warning"] else ""
    label = html_text(f"tokens of {example['where'] or 'an example'}")
    return (
        f'<div class="lens"><p class="prompt">{html_text(header(example))}</p>{warning}{_hue(example, place)}'
        f'<div class="turns" role="radiogroup" aria-label="{label}">{inner}</div>'
        f"<details><summary>The same as a table</summary>{_table(example, shown)}</details></div>"
    )


def _left_out(count: int, where: str) -> str:
    return f'<b></b><div class="soft">{count:,} tokens {where} are not shown</div>' if count else ""


def _hue(example: Mapping[str, Any], place: int) -> str:
    """Which loss the colours show, where there are two."""
    if not (example["before"] and example["after"]):
        return ""
    choices = (("after", ' class="is" checked'), ("before", ' class="was"'))
    inner = "".join(f'<label><input type="radio" name="hue{place}"{more}> {name}</label>' for name, more in choices)
    return f'<fieldset class="hue">Colours by the loss {inner}</fieldset>'


def _row(example: Mapping[str, Any], places: Sequence[int], group: int) -> str:
    pieces = []
    for at in places:
        token = example["tokens"][at]
        marks = ["tk", *["on"] * token["counts"], *["cut"] * token["cut"]]
        text = f"<span{_colours(example, at)}>{html_text(seen(token['text']))}</span>"
        line = "<br>" * ("\n" in token["text"] and at != places[-1])
        details = html_text(_details(example, at))
        pieces.append(
            f'<label class="{" ".join(marks)}"><input type="radio" name="lens{group}">{text}<i>{details}</i></label>{line}'
        )
    return "".join(pieces)


def _colours(example: Mapping[str, Any], at: int) -> str:
    """The classes of a token: ``a`` for the colour that is shown at first, ``b`` for the other one."""
    first, other = ("after", "before") if example["after"] else ("before", "after")
    found = [
        f"{letter}{level(example[name][at])}"
        for letter, name in (("a", first), ("b", other))
        if example[name] and example[name][at] is not None
    ]
    return f' class="{" ".join(found)}"' if found else ""


def _details(example: Mapping[str, Any], at: int) -> str:
    token = example["tokens"][at]
    named = f" ({token['name']})" if token["name"] != token["text"] else ""
    losses = [example[name][at] for name in ("before", "after") if example[name]]
    parts = [f"token {example['first'] + at + 1}: {seen(token['text'])}{named}", f"id {token['id']}", token["role"]]
    parts += [state(token)] + [f"loss {' → '.join(map(number, losses))}"] * any(loss is not None for loss in losses)
    return " | ".join(filter(None, parts))


def state(token: Mapping[str, Any]) -> str:
    """A token counts in the loss, is read alone, or was cut."""
    return "cut" if token["cut"] else "counts" if token["counts"] else "read"


def _table(example: Mapping[str, Any], shown: Sequence[int]) -> str:
    kinds = [name for name in ("before", "after") if example[name]]
    rows = []
    for at in shown:
        token = example["tokens"][at]
        own = (example["first"] + at + 1, seen(token["text"]), token["id"], token["role"], state(token))
        rows.append((*own, *(number(example[name][at]) for name in kinds)))
    heads = ["token", "text", "id", "role", "in the loss", *(f"{name}, nats" for name in kinds)]
    return html_table(heads, rows, (0, 2, *range(5, 5 + len(kinds))))

"""The frame of a page: its style, its sections, and pictures that fit a wide page and a phone.

Light and dark follow the reader's system. What is wider than the page scrolls by itself, and a shade on its edge says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minilora.report.canvas import missing
from minilora.report.svg import COLOURS, inline_svg
from minilora.report.tables import html_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page", "picture", "section"]

_LIGHT, _DARK = (";".join(f"--{name}:{pair[dark]}" for name, pair in COLOURS.items()) for dark in (0, 1))
_COLOURS = f":root{{color-scheme:light dark;{_LIGHT}}}@media(prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
_STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1100px;padding:28px 24px 48px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:28px;line-height:1.2;margin:0}h2{font-size:19px;margin:0 0 4px}p{margin:0 0 10px}
.soft,figcaption,th{color:var(--soft)}.warn{color:var(--c1);font-weight:600}
section{margin-top:32px;padding-top:20px;border-top:1px solid var(--line)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;margin-top:20px}
.tiles div{background:var(--card);border-radius:8px;padding:10px 14px}.tiles b{display:block;font-size:18px}
.curves{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:20px 24px}
.curves>:first-child:not(:last-child){grid-area:span 2/span 2}.curves>:only-child{grid-column:1/-1}
.pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px 32px;align-items:start;margin-bottom:16px}
.beside{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px 32px;align-items:start}
figure{margin:0 0 10px;min-width:0}figcaption{font-size:13px}figcaption b{color:var(--ink)}
svg{display:block;width:100%}svg path{stroke-linejoin:round}.phone{display:none}
.scroll{overflow:auto;--shade:#80808080;background:
linear-gradient(90deg,var(--page) 40%,transparent) 0 0/40px 100% local,
linear-gradient(270deg,var(--page) 40%,transparent) 100% 0/40px 100% local,
linear-gradient(90deg,var(--shade),transparent) 0 0/14px 100%,
linear-gradient(270deg,var(--shade),transparent) 100% 0/14px 100%,
linear-gradient(var(--page) 40%,transparent) 0 0/100% 40px local,
linear-gradient(0deg,var(--page) 40%,transparent) 0 100%/100% 40px local,
linear-gradient(var(--shade),transparent) 0 0/100% 14px,
linear-gradient(0deg,var(--shade),transparent) 0 100%/100% 14px;background-repeat:no-repeat}
.low{max-height:620px}table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;vertical-align:top;padding:5px 14px 5px 0;border-bottom:1px solid var(--line)}
td,.said,.prompt{white-space:pre-wrap}th{font-weight:500;font-size:13px}
td:first-child:not(.num){min-width:9.5em}th{overflow-wrap:normal}
.num{text-align:right;font-variant-numeric:tabular-nums}td.num{white-space:nowrap;overflow-wrap:normal}
.said{background:var(--card);border-radius:8px;padding:10px 14px}.after{box-shadow:inset 3px 0 var(--c0)}
.said b{display:block;font-size:13px;color:var(--soft);font-weight:500}.prompt{margin:14px 0 8px;font-weight:600}
@media(max-width:1000px){.curves{grid-template-columns:repeat(auto-fit,minmax(290px,1fr))}
.curves>:first-child:not(:last-child){grid-area:auto/1/auto/-1}}
@media(max-width:760px){body{padding:18px 16px 32px}.pair{grid-template-columns:minmax(0,1fr)}
.tiles{grid-template-columns:1fr 1fr}th,td{padding-right:8px}td:first-child:not(.num){min-width:5.5em}
.roomy{display:none}.phone{display:block}}@media print{.low{max-height:none}}
"""


def page(
    title: str, subtitle: str, headline: Iterable[Mapping[str, Any]], body: str, style: str = "", pictures: bool = True
) -> str:
    """One self-contained HTML page: texts, tiles of {label, value}, and ``body``, which is HTML already.

    Args:
        style: CSS of a part that not every page has. pictures: whether the page would have some, so that it says why there are none.
    """
    tiles = "".join(
        f'<div><span class="soft">{html_text(tile["label"])}</span><b>{html_text(tile["value"])}</b></div>'
        for tile in headline
    )
    title = html_text(title)
    under = f'<p class="soft">{html_text(subtitle)}</p>' if subtitle else ""
    under += f"<p>No pictures: {html_text(missing())}.</p>" if pictures and missing() else ""
    # The policy makes the browser itself refuse whatever would leave the page, should an escape ever be forgotten.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_COLOURS}{_STYLE}{style}</style></head>\n<body><header><h1>{title}</h1>{under}</header>"
        + (f'<div class="tiles">{tiles}</div>' if tiles else "")
        + body
        + "\n</body></html>\n"
    )


def section(heading: str, body: str | Sequence[Any], lead: str = "") -> str:
    """A part of the page; nothing where there is no body."""
    words = f'<p class="soft">{html_text(lead)}</p>' if lead else ""
    return f"\n<section><h2>{html_text(heading)}</h2>{words}{body}</section>" if body else ""


def picture(heading: str, words: str, draw: Callable[..., Figure], width: float, phone: float | None = None) -> str:
    """The figure ``draw(width=...)`` with a heading; where matplotlib is missing nothing, which ``page`` says.

    Args:
        words: what it shows, for who cannot see it. width: inches.
        phone: inches on a narrow page, where it is drawn anew: smaller, with type of the same size.
    """
    if missing():
        return ""
    import matplotlib.style

    parts = {"": width} if phone is None else {"roomy": width, "phone": phone}
    with matplotlib.style.context({}, after_reset=True):  # the page looks the same whatever the reader's own style is
        drawn = {look: inline_svg(draw(width=inches), words) for look, inches in parts.items()}
    above = f"<figcaption><b>{html_text(heading)}</b></figcaption>" if heading else ""
    boxes = "".join(f'<div class="scroll {look}">{svg}</div>' for look, svg in drawn.items())
    return f"<figure>{above}{boxes}</figure>"

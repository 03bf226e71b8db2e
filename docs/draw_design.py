"""Draw ``docs/design.svg``: the path of a weight through a layer, and the house of modules with its one direction.

The rooms are read from ROOMS, which the layering test enforces on the imports; run this file after changing it.
"""

from __future__ import annotations

import html
from pathlib import Path

# The rooms of the house, from the ground up: (room, what lives there, its files in reading order). A room imports from the rooms
# above its own line, never from below; inside a room there is no circle. A room without files is one module of that name.
ROOMS: list[tuple[str, str, list[str]]] = [
    ("errors", "what minilora raises", []),
    (
        "files",
        "bytes to and from a disk, and what values may be",
        ["validate", "parse", "disk", "read", "write", "staging"],
    ),
    (
        "quant",
        "weights in few bits",
        ["codebooks", "config", "blockwise", "quantized", "nested", "scales", "lookup", "finite", "bnb"],
    ),
    ("linear", "a product with a frozen weight", ["layers", "ops", "fused", "cuda"]),
    (
        "lora",
        "the adapters and where they go",
        [
            "layer",
            "adapter",
            "config",
            "config_file",
            "slots",
            "match",
            "inject",
            "targets",
            "architectures",
            "tying",
            "variants",
        ],
    ),
    ("qlora", "a whole model packed", ["quantize_model", "calibrate", "kbit"]),
    ("store", "adapters as folders", ["save", "load", "fill", "adapter_files", "fingerprint", "tensors", "export"]),
    ("many", "several adapters in one model", ["adapted", "batched", "combine", "hotswap"]),
    ("report", "what people look at", ["page", "pictures", "tables", "inspect"]),
    (
        "training",
        "a run",
        [
            "loop",
            "data",
            "encoding",
            "tokens",
            "layout",
            "template",
            "used",
            "bounded",
            "records",
            "fields",
            "losses",
            "schedule",
            "optim",
            "guards",
            "step",
            "memory",
            "signals",
            "checkpoint",
            "resume",
            "lock",
            "progress",
        ],
    ),
    ("measure", "memory and time", ["plan", "ledger", "bench", "worker"]),
    ("peft_model", "the face that PEFT's users know", []),
    ("compat", "PEFT's other names", []),
    ("demo", "the keeper's conversations", []),
    ("hf", "all that knows transformers", []),
    ("cli", "the command line", []),
]
INK, SOFT, FROZEN, TRAINED, BOX = "#1b1e22", "#5b636d", "#0072b2", "#c25400", "#f3f4f3"
WIDTH, ROW, TOP = 940, 34, 250


def text(
    x: float, y: float, words: str, size: int = 13, colour: str = INK, anchor: str = "start", weight: int = 400
) -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{html.escape(words)}</text>"
    )


def box(x: float, y: float, w: float, h: float, colour: str, words: str, under: str = "") -> str:
    label = text(x + w / 2, y + h / 2 + (0 if under else 5), words, 14, "#fff", "middle", 600)
    small = text(x + w / 2, y + h / 2 + 18, under, 11, "#fff", "middle") if under else ""
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" fill="{colour}"/>{label}{small}'


def arrow(*points: tuple[float, float]) -> str:
    path = " L".join(f"{x},{y}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{SOFT}" stroke-width="1.6" marker-end="url(#tip)"/>'


def layer() -> str:
    """One adapted layer: x through the frozen packed weight and, beside it, through A and B."""
    return "".join(
        [
            text(24, 34, "One layer: a slot holds a base layer, or an adapter around it", 15, INK, weight=600),
            text(40, 118, "x", 16, weight=600),
            arrow((58, 113), (150, 113)),
            arrow((80, 113), (80, 193), (210, 193)),
            box(
                154,
                78,
                330,
                70,
                FROZEN,
                "base_layer: W frozen, packed",
                "4-bit codes and scales, decoded a few rows at a time",
            ),
            text(120, 186, "dropout", 11, SOFT),
            box(214, 168, 110, 50, TRAINED, "lora_A", "[r, in] fp32"),
            arrow((324, 193), (366, 193)),
            box(370, 168, 114, 50, TRAINED, "lora_B", "[out, r] fp32"),
            arrow((484, 113), (576, 113)),
            arrow((484, 193), (590, 193), (590, 129)),
            text(496, 186, "x scaling", 11, SOFT),
            text(427, 234, "starts at 0", 11, SOFT, "middle"),
            f'<circle cx="590" cy="113" r="13" fill="none" stroke="{SOFT}" stroke-width="1.6"/>',
            text(590, 118, "+", 16, INK, "middle"),
            arrow((603, 113), (650, 113)),
            text(658, 118, "y", 16, weight=600),
            text(706, 92, "the law, in eval mode:", 12, SOFT),
            text(706, 112, "y = x (W + delta_weight())ᵀ + b", 13),
            text(706, 132, "merge, unmerge, sums, spectra", 12, SOFT),
            text(706, 150, "and export follow from it", 12, SOFT),
            text(706, 186, "blue: frozen", 12, FROZEN, weight=600),
            text(706, 204, "orange: trained", 12, TRAINED, weight=600),
        ]
    )


def house() -> tuple[str, int]:
    """The rooms, one row each, with their files in reading order."""
    says = "The house: a room imports from the rooms above it, never from below"
    parts = [text(24, TOP + 14, says, 15, INK, weight=600)]
    y = TOP + 32
    for name, about, files in ROOMS:
        parts.append(f'<rect x="24" y="{y}" width="{WIDTH - 100}" height="{ROW - 6}" rx="5" fill="{BOX}"/>')
        parts.append(text(36, y + 19, name, 14, INK, weight=600))
        parts.append(text(120, y + 19, about, 12, SOFT))
        parts.append(text(410, y + 19, " · ".join(files), 12, INK))
        y += ROW
    parts.append(arrow((WIDTH - 50, y - 12), (WIDTH - 50, TOP + 36)))
    parts.append(
        f'<g transform="translate({WIDTH - 30},{(TOP + y) / 2 + 40}) rotate(-90)">{text(0, 0, "imports", 12, SOFT, "middle")}</g>'
    )
    return "".join(parts), y


def draw() -> str:
    rows, bottom = house()
    says = "An adapted layer, and the rooms of minilora in the order of their imports"
    tip = f'<path d="M0,0 L8,4 L0,8 z" fill="{SOFT}"/>'
    tip = f'<marker id="tip" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto">{tip}</marker>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 10}" role="img" aria-label="{says}" '
        f'font-family="system-ui,Segoe UI,DejaVu Sans,sans-serif"><defs>{tip}</defs>'
        f'<rect width="100%" height="100%" fill="#fff"/>{layer()}{rows}</svg>\n'
    )


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    (here / "design.svg").write_text(draw(), encoding="utf-8")

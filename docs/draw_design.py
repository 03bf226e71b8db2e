"""Draw ``docs/design.svg`` and ``docs/design-dark.svg``: one adapted layer, and the folders of the package in the order of their imports.

The folders are read from ROOMS, which ``tests/test_layering.py`` enforces on the imports; run this file after changing it.
"""

from __future__ import annotations

import html
from pathlib import Path

# The folders of the package, from the ground up: (folder, what lives there, its files in reading order). A folder imports from the
# folders above its own line, never from below; inside a folder there is no circle. One without files is one module of that name.
ROOMS: list[tuple[str, str, list[str]]] = [
    ("errors", "the exceptions that minilora raises", []),
    ("lazy", "names that are imported when asked for", []),
    (
        "files",
        "reading and writing files safely",
        ["validate", "parse", "disk", "read", "tensors", "write", "staging", "fresh", "hub"],
    ),
    (
        "quant",
        "weights stored in a few bits",
        [
            "constants",
            "codebooks",
            "config",
            "blockwise",
            "weight",
            "quantized",
            "stack",
            "nested",
            "scales",
            "lookup",
            "finite",
            "bnb",
            "on_disk",
            "gguf",
        ],
    ),
    (
        "gguf",
        "GGUF files, read and written",
        ["file", "header", "kinds", "words", "names", "lora", "write", "rewrite"],
    ),
    (
        "linear",
        "multiplying with a frozen weight",
        [
            "layers",
            "convolution",
            "foreign",
            "frozen",
            "packed",
            "gguf",
            "shown",
            "fronts",
            "ops",
            "fused",
            "stacked",
            "cuda",
            "experts",
        ],
    ),
    (
        "lora",
        "the adapters, and where they go",
        [
            "layer",
            "adapter",
            "config",
            "config_file",
            "vera_config",
            "starts",
            "factors",
            "update",
            "slot",
            "slots",
            "change",
            "bare",
            "match",
            "named",
            "inject",
            "targets",
            "patterns",
            "architectures",
            "tying",
            "bases",
            "copies",
            "coverage",
            "variants",
        ],
    ),
    ("qlora", "packing a whole model", ["quantize_model", "calibrate", "kbit"]),
    (
        "store",
        "adapter folders: save and load",
        [
            "save",
            "load",
            "copies",
            "projections",
            "fill",
            "tables",
            "adapter_files",
            "fingerprint",
            "tensors",
            "old_experts",
            "contents",
        ],
    ),
    (
        "export",
        "adapters for other programs",
        [
            "folders",
            "factors",
            "stored",
            "base",
            "plain_peft",
            "mlx",
            "diffusers",
            "llama_cpp",
            "served",
            "ollama",
            "servers",
            "programs",
        ],
    ),
    (
        "many",
        "several adapters in one model",
        [
            "adapted",
            "merging",
            "batched",
            "combine",
            "arithmetic",
            "parts",
            "convert",
            "scaling",
            "intruders",
            "eva",
            "principal",
            "hotswap",
            "frozen",
        ],
    ),
    (
        "report",
        "pages, charts and tables",
        [
            "page",
            "runs_page",
            "figures",
            "sweep_figures",
            "frontier",
            "labels",
            "lab_figures",
            "claim_figures",
            "heatmap",
            "canvas",
            "lens",
            "frame",
            "svg",
            "tables",
            "inspect",
        ],
    ),
    (
        "data",
        "from records to batches of tokens",
        [
            "sources",
            "shapes",
            "records",
            "fields",
            "chat",
            "tokens",
            "lesson",
            "cutting",
            "encoding",
            "places",
            "examples",
            "numbers",
            "store",
            "store_key",
            "lens",
            "batches",
            "packing",
        ],
    ),
    (
        "training",
        "the training run",
        [
            "loop",
            "losses",
            "chunked",
            "head",
            "probe",
            "packed",
            "settings",
            "schedule",
            "optim_choice",
            "optim",
            "optim_closure",
            "optim_adamw8",
            "optim_bnb",
            "optim_muon",
            "optim_lora_fa",
            "optim_riemannian",
            "optim_state",
            "precision",
            "guards",
            "check",
            "compiling",
            "offload",
            "flops",
            "step",
            "memory",
            "profile",
            "signals",
            "checkpoint",
            "lock",
            "left",
            "meaning",
            "resume",
            "meeting",
            "lifeline",
            "processes",
            "sharding",
            "rows",
            "together",
            "best",
            "run_folder",
            "endings",
            "progress",
        ],
    ),
    ("measure", "memory and time of a training step", ["plan", "ledger", "bench", "meter", "worker"]),
    ("demo", "data and settings of make demo", []),
    ("hf", "everything that uses transformers", []),
    (
        "peft",
        "PEFT's names, at PEFT's places",
        [
            "peft_model",
            "face",
            "faces",
            "experts",
            "shape",
            "facts",
            "many",
            "folders",
            "plain",
            "notes",
            "base",
            "layers",
            "parts",
            "wrappers",
            "lora_model",
            "mapping",
            "status",
            "auto",
            "hub",
            "card",
            "meta",
            "inner",
            "functional",
            "others",
            "helpers",
            "config",
            "mapping_func",
            "optimizers",
            "tuners",
            "utils",
        ],
    ),
    (
        "doctor",
        "what is wrong with an adapter folder",
        [
            "examine",
            "finding",
            "place",
            "foreign",
            "case",
            "names",
            "model",
            "tensors",
            "keys",
            "config",
            "base",
            "around",
        ],
    ),
    (
        "proof",
        "whether a server applies an adapter",
        [
            "probe",
            "curves",
            "measured",
            "verdict",
            "wire",
            "ask",
            "inside",
            "verified",
        ],
    ),
    (
        "job",
        "a fine-tuning job, from data to report",
        [
            "finetune",
            "settings",
            "given",
            "record",
            "sessions",
            "in_hand",
            "voices",
            "examples",
            "loading",
            "told",
            "start",
            "rehearsal",
            "gguf_info",
            "trackers",
            "outcome",
            "described",
            "look",
            "lens",
            "info",
            "compare",
            "probed",
            "push",
            "card",
        ],
    ),
    (
        "lab",
        "many fine-tunings, and what is claimed",
        [
            "sweeps",
            "jobs",
            "verdicts",
            "measures",
            "byte_model",
            "ground",
            "cost",
            "variants",
            "claims",
            "trying",
        ],
    ),
    (
        "learn",
        "the course's exercises and graders",
        [
            "course",
            "answer",
            "grade",
            "shown",
            "case",
            "judge",
            "mutant",
            "apart",
            "progress",
            "exercises",
            "solutions",
            "graders",
            "mutants",
        ],
    ),
    ("cli", "the commands of minilora", []),
]
LIGHT = {"page": "#ffffff", "ink": "#1b1e22", "soft": "#5b636d", "frozen": "#0072b2", "trained": "#c25400", "row": "#f3f4f3"}  # fmt: skip
DARK = {"page": "#14161a", "ink": "#e7e9ec", "soft": "#a3abb5", "frozen": "#1f78b4", "trained": "#b85a12", "row": "#1d2026"}  # fmt: skip
DARK_LABELS = {
    "frozen": "#56b4e9",
    "trained": "#f0903c",
}  # on the dark page the colours of the boxes are too dark for words
WIDTH, LINE, TOP = 940, 17, 262
LONGEST = 80  # signs of a line of file names


def text(x: float, y: float, words: str, size: int = 13, colour: str = "ink", anchor: str = "start", weight: int = 400) -> str:  # fmt: skip
    style = f'font-size="{size}" fill="{{{colour}}}" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x}" y="{y}" {style}>{html.escape(words)}</text>'


def box(x: float, y: float, w: float, h: float, colour: str, words: str, under: str) -> str:
    label = text(x + w / 2, y + h / 2, words, 14, "white", "middle", 600)
    small = text(x + w / 2, y + h / 2 + 18, under, 11, "white", "middle")
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="7" fill="{{{colour}}}"/>{label}{small}'


def arrow(*points: tuple[float, float]) -> str:
    path = " L".join(f"{x},{y}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{{soft}}" stroke-width="1.6" marker-end="url(#tip)"/>'


def layer() -> str:
    """One adapted layer: x through the frozen weight and, beside it, through A and B."""
    says = "One adapted layer: the frozen weight W and, beside it, the trained matrices A and B"
    return "".join(
        [
            text(24, 34, says, 15, weight=600),
            text(30, 108, "x", 16, weight=600),
            arrow((48, 103), (140, 103)),
            arrow((68, 103), (68, 193), (194, 193)),
            box(144, 68, 320, 70, "frozen", "W (base_layer)", "frozen; may be stored in 4 bits"),
            text(106, 184, "dropout", 11, "soft"),
            box(198, 166, 112, 54, "trained", "A (lora_A)", "r × in, fp32"),
            arrow((310, 193), (348, 193)),
            box(352, 166, 112, 54, "trained", "B (lora_B)", "out × r, fp32"),
            text(408, 238, "starts at zero", 11, "soft", "middle"),
            arrow((464, 103), (589, 103)),
            arrow((464, 193), (606, 193), (606, 120)),
            text(474, 184, "times lora_alpha / r", 11, "soft"),
            '<circle cx="606" cy="103" r="13" fill="none" stroke="{soft}" stroke-width="1.6"/>',
            text(606, 108, "+", 16, anchor="middle"),
            arrow((619, 103), (660, 103)),
            text(668, 108, "y", 16, weight=600),
            text(700, 84, "y = W x + (lora_alpha / r) B A x", 12),
            text(700, 108, "The update is one matrix of W's shape:", 11, "soft"),
            text(700, 124, "it can be added into W (merge)", 11, "soft"),
            text(700, 140, "and taken out again (unmerge).", 11, "soft"),
            text(700, 172, "blue: frozen, never changes", 12, "frozen label", weight=600),
            text(700, 192, "orange: trained", 12, "trained label", weight=600),
        ]
    )


def wrapped(files: list[str]) -> list[str]:
    """The names of files in lines of at most LONGEST signs; one empty line if there are none."""
    lines = [""]
    for name in files:
        longer = f"{lines[-1]} · {name}" if lines[-1] else name
        if len(longer) <= LONGEST:
            lines[-1] = longer
        else:
            lines.append(name)
    return lines


def folders() -> tuple[str, int]:
    """The folders, one row each, with their files in reading order; and where the last row ends."""
    says = "The folders of the package minilora: each imports only from the folders above it"
    parts, y = [text(24, TOP + 14, says, 15, weight=600)], TOP + 30
    for name, about, files in ROOMS:
        lines = wrapped(files)
        height = 14 + LINE * len(lines)
        parts.append(f'<rect x="24" y="{y}" width="{WIDTH - 96}" height="{height - 4}" rx="5" fill="{{row}}"/>')
        parts.append(text(36, y + 18, name, 14, weight=600))
        parts.append(text(142, y + 18, about, 12, "soft"))
        parts += [text(390, y + 18 + LINE * number, line, 12) for number, line in enumerate(lines) if line]
        y += height
    parts.append(arrow((WIDTH - 46, y - 8), (WIDTH - 46, TOP + 32)))
    middle = f"translate({WIDTH - 26},{(TOP + y) / 2 + 40}) rotate(-90)"
    parts.append(f'<g transform="{middle}">{text(0, 0, "imports", 12, "soft", "middle")}</g>')
    return "".join(parts), y


def draw(dark: bool = False) -> str:
    rows, bottom = folders()
    colours = DARK if dark else LIGHT
    colours = (
        colours | {f"{name} label": (DARK_LABELS if dark else LIGHT)[name] for name in DARK_LABELS} | {"white": "#fff"}
    )
    says = "One adapted layer, and the folders of minilora in the order of their imports"
    tip = '<path d="M0,0 L8,4 L0,8 z" fill="{soft}"/>'
    tip = f'<marker id="tip" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto">{tip}</marker>'
    drawing = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 8}" role="img" aria-label="{says}" '
        f'font-family="system-ui,Segoe UI,DejaVu Sans,sans-serif"><defs>{tip}</defs>'
        f'<rect width="100%" height="100%" fill="{{page}}"/>{layer()}{rows}</svg>\n'
    )
    for name, colour in colours.items():
        drawing = drawing.replace(f"{{{name}}}", colour)
    return drawing.replace("><", ">\n<")  # one element a line, for whoever reads the difference


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    (here / "design.svg").write_text(draw(), encoding="utf-8")
    (here / "design-dark.svg").write_text(draw(dark=True), encoding="utf-8")

"""The tables and single figures of the documentation, made from ``benchmarks/results/*.csv``, so that a figure stands in one place.

    python docs/tables.py        # writes the comparison into README.md again; do it after a benchmark has written its CSV file

The pages of ``docs/`` ask for a table with ``{results} NAME`` and for one figure with ``{csv}`FILE | ROW | COLUMN```; ``site.py`` calls
this file while the site is built. What no CSV file holds (kills, damaged files) is taken from the tables of ``docs/guarantees.md``.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"
README = DOCS.parent / "README.md"
Row = dict[str, str]


def read(name: str) -> list[Row]:
    """The rows of ``benchmarks/results/<name>.csv``."""
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def find(name: str, what: str, setting: str = "") -> Row:
    """The one row that begins with ``what`` and whose setting begins with ``setting``. Raises ``LookupError`` with the closest names."""
    rows = read(name)
    first = next(iter(rows[0]))
    found = [row for row in rows if row[first] == what and row.get("setting", "").startswith(setting)]
    if len(found) != 1:
        close = difflib.get_close_matches(what, [row[first] for row in rows], cutoff=0.3)
        raise LookupError(f"{name}.csv has {len(found)} rows {what!r} {setting!r}; wanted one; close are {close}")
    return found[0]


def three_digits(value: float) -> str:
    """``value`` with three significant digits and no exponent: 0.0451, 6.27, 455, 1,927."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def amount(value: str, unit: str) -> str:
    """A CSV value with its unit, in seconds from 1,000 ms on."""
    number = float(value)
    return f"{three_digits(number / 1000)} s" if unit == "ms" and number >= 1000 else f"{three_digits(number)} {unit}"


def figure(name: str, what: str, column: str, setting: str = "") -> str:
    """One figure in words: ``ours`` and ``peer`` are medians of processor time (or MB), ``ratio`` is the factor between them."""
    row = find(name, what, setting)
    if column in ("ours", "peer", "floor", "peer floor"):
        return amount(row[f"{column} cpu median"], row["unit"])
    if column == "ratio":
        return three_digits(float(row["ratio cpu"])).rstrip(".")
    return three_digits(float(row[column]))


def over_floor(name: str, what: str, side: str) -> str:
    """By how many percent a step takes longer than that of the frozen model."""
    row = find(name, what)
    floor = "floor" if side == "ours" else "peer floor"
    return f"{100 * (float(row[f'{side} cpu median']) / float(row[f'{floor} cpu median']) - 1):.0f} %"


def lowered(name: str, base: str, what: str, column: str) -> str:
    """By how many percent ``column`` is lower in row ``what`` than in row ``base``."""
    return f"{100 * (1 - float(find(name, what)[column]) / float(find(name, base)[column])):.0f} %"


# ---- whole tables


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; columns of figures stand to the right."""
    numeric = [all(row[i][:1].isdigit() or not row[i] for row in rows) for i in range(len(heads))]
    lines = [heads, ["---:" if right else "---" for right in numeric], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def speed(name: str) -> str:
    """The comparisons of one run of ``benchmarks/cpu.py``, and what it ran on."""
    lines = read(name)
    heads = ["what", "minilora", "PEFT / bitsandbytes", "ratio (wall)", "goal"]
    return f"{machine(lines[0])}\n\n{markdown(heads, [compared(line) for line in lines])}"


def compared(line: Row) -> list[str]:
    """One comparison: both sides in processor time with their range, the ratio, and whether the goal was reached."""
    said = f"{line['what']} ({line['setting']}"
    if line["kind"] == "overhead":
        said += f"; frozen {line['floor cpu median']} / {line['peer floor cpu median']} ms"
    sides = []
    for side in ("ours", "peer"):
        middle, low, high = (three_digits(float(line[f"{side} cpu {end}"])) for end in ("median", "min", "max"))
        sides.append(f"{middle} {line['unit']} ({low}-{high})")
    goal = line["goal"].replace(">=", "≥").replace("<=", "≤") + ("" if line["reached"] == "True" else ", missed")
    return [f"{said})", *sides, f"{line['ratio cpu']} ({line['ratio wall']})", goal]


def machine(row: Row) -> str:
    """What a CSV file says about the machine and the versions of its run."""
    versions = ", ".join(f"{name} {row[name]}" for name in ("torch", "peft", "bitsandbytes", "transformers"))
    bf16 = "with" if row["bf16 products"] == "True" else "without"
    threads = "one thread" if row["threads"] == "1" else f"{row['threads']} threads"
    return f"Measured at commit {row['commit']} on {row['cpu']}, {bf16} bf16 products, {threads}; {versions}."


def formats() -> str:
    """A format a line: its bits, its error on normal weights, and each model's KL with its range."""
    models, rows = ("byte model", "SmolLM2-135M"), []
    for row in read("formats"):
        kl = [[float(row[f"{model} KL{end}"]) for end in ("", " min", " max")] for model in models]
        cells = [f"{middle:.4f} ({low:.4f}-{high:.4f})" for middle, low, high in kl]
        rows.append([row["format"], f"{float(row['bits']):.3f}", f"{float(row['rmse_normal']):.4f}", *cells])
    return markdown(["format", "bits", "RMSE, N(0,1)", *(f"KL, {model} (range)" for model in models)], rows)


def gguf_decode() -> str:
    """Decoding GGUF's blocks: minilora, the ``gguf`` package and the formula of each format."""
    sides, rows = ("minilora", "minilora, kept buffer", "gguf package", "formula"), []
    for row in read("gguf_decode"):
        times = []
        for side in sides:
            middle, low, high = (three_digits(float(row[f"{side} ms{end}"])) for end in ("", " min", " max"))
            times.append(f"{middle} ({low}-{high})")
        ratios = [f"{row[f'{side} / minilora']}x" for side in sides[2:]]
        rows.append([row["format"], row["bits"], row["weight"].replace("x", " x "), *times, *ratios])
    heads = [*(f"{side} (ms)" for side in sides), *(f"{side} / minilora" for side in sides[2:])]
    return markdown(["format", "bits", "weight", *heads], rows)


def loading() -> str:
    """Memory of loading a model into NF4, MiB above the start."""
    rows = []
    for row in read("loading"):
        end, peak = float(row["end"]), float(row["peak"])
        rows.append(
            [
                row["way"].replace("double_quant", "double quantization"),
                f"{end:.0f}",
                f"{peak:.0f}",
                f"{peak / end:.2f}",
                row["seconds"],
            ]
        )
    return markdown(["", "in memory after (MiB)", "peak (MiB)", "peak / after", "seconds"], rows)


def head_loss() -> str:
    """Time and memory of an output head's loss, with all logits and in chunks."""
    rows = []
    for row in read("head_loss"):
        cells = [
            f"{float(row[f'{way} {unit}']):.{digits}f}" for unit, digits in (("s", 2), ("MB", 0)) for way in HEAD_WAYS
        ]
        rows.append([row["what"], row["vocabulary"], *cells, row["time in chunks / all"], row["loss differs by"]])
    heads = [f"{way} ({unit})" for unit in ("s", "MB") for way in HEAD_WAYS]
    return markdown(["head", "vocabulary", *heads, "time, chunks / all", "loss differs by"], rows)


HEAD_WAYS = ("all logits", "in chunks")


def packing() -> str:
    """A training step padded and packed."""
    rows = []
    for row in read("packing"):
        padding = [f"{100 * float(row[name]):.1f} %" for name in ("padding", "padding packed")]
        steps = [f"{float(row[f'{way} s']):.2f} ({row[f'{way} s least']}-{row[f'{way} s most']})" for way in STEP_WAYS]
        times = [f"{row[f'{way} / packed']}x" for way in STEP_WAYS[:2]]
        rows.append([row["what"], *padding, *steps, *times, row["gradient differs by"], row["auto"]])
    heads = ["examples", "padding", "padding, packed", "a step, padded, all logits (s)", "padded (s)", "packed (s)"]
    heads += ["all logits / packed", "padded / packed", "gradient differs by", "`--pack auto`"]
    return markdown(heads, rows)


STEP_WAYS = ("all logits", "padded", "packed")


def kernels(triton: str) -> str:
    """What one version of Triton compiled: registers / KB of shared memory / instructions, a line for each launch."""
    lines = [row for row in read("kernels") if row["triton"] == triton]
    archs = list(dict.fromkeys(row["arch"] for row in lines))
    cell = {(row["launch"], row["arch"]): f"{row['registers']} / {row['shared_kb']} / {row['length']}" for row in lines}
    launches = dict.fromkeys(row["launch"] for row in lines)
    return markdown(["launch", *archs], [[name, *(cell.get((name, arch), "") for arch in archs)] for name in launches])


def on_a_gpu(card: str) -> str:
    """Times of a product with a low-rank part on a card, in microseconds, and what is taken over the dense product."""
    first, *lines = (RESULTS / f"gpu_{card}.csv").read_text(encoding="utf-8").splitlines()
    times: dict[tuple[str, ...], dict[str, str]] = {}
    for row in csv.DictReader(lines):
        if row["pass"] in ("forward", "dgrad"):
            times.setdefault((row["pass"], row["N"], row["K"], row["M"]), {})[row["method"]] = row["us"]
    rows = []
    for (which, n, k, m), own in times.items():
        cells = [three_digits(float(own[method])) for method in GPU_METHODS]
        over = float(own["as chosen, with low rank"]) / float(own["bf16 product"])
        rows.append([which, f"{n} x {k}", m, *cells, f"{over:.2f}"])
    heads = [
        "",
        "weight",
        "rows",
        "dense bf16 (µs)",
        "kernel",
        "decoded first",
        "sequence",
        "as taken",
        "as taken / dense",
    ]
    return f"{first.removeprefix('# ')}.\n\n{markdown(heads, rows)}"


GPU_METHODS = (
    "bf16 product",
    "kernel with low rank",
    "decoded first, with low rank",
    "sequence with low rank",
    "as chosen, with low rank",
)


def sweeps(files: Sequence[str]) -> str:
    """K fine-tunings in one pass beside K runs."""
    rows = []
    for row in (row for file in files if (RESULTS / f"{file}.csv").exists() for row in read(file)):
        peer = [row.get(f"K of PEFT / {what}", "") for what in ("steps", "memory")]
        rows.append([row["model"], row["K"], row["steps / K runs"], row["memory / K runs"], *peer])
    return markdown(
        ["model", "K", "time of the steps / K runs", "memory / K runs", "K of PEFT / time", "K of PEFT / memory"], rows
    )


def workers() -> str:
    """Two processes beside two threads, for many small fine-tunings."""
    rows = read("sweep_workers")
    ratio = next(name for name in rows[0] if name.startswith("of "))
    return markdown(
        ["", "seconds a step of all trials", ratio], [[row["way"], row["s a step"], row[ratio]] for row in rows]
    )


def cost() -> str:
    """Time at n and at 4n of what must not grow with the square."""
    rows = [
        [
            row["task"],
            f"{int(row['n']):,} {row['unit']}",
            amount(row["ms"], "ms"),
            amount(row["ms at 4n"], "ms"),
            row["ratio"],
        ]
        for row in read("cost")
    ]
    return markdown(["", "n", "time at n", "at 4n", "ratio"], rows)


def store() -> str:
    """Starts with the token store, and without it."""
    rows = []
    for row in read("store"):
        kept = [three_digits(float(row[f"{which} bytes a token"])) for which in ("held", "peak")]
        rows.append(
            [
                row["what"],
                f"{int(row['lines']):,}",
                f"{int(row['tokens']):,}",
                three_digits(float(row["cpu seconds"])),
                *kept,
            ]
        )
    return markdown(["", "lines", "tokens", "seconds of the processor", "bytes a token, after", "at the peak"], rows)


def verified() -> str:
    """What ``minilora verify`` says of a llama.cpp server, by what is served."""
    rows = []
    for row in read("verify"):
        off = [row[f"from the {what}"] for what in ("base", "adapted model", "best scale")]
        rows.append([row["what"], *off, row["scale"], row["verdict"], row["exit code"]])
    heads = [
        "served",
        "from the base",
        "from the adapted model",
        "from the best scale",
        "scale",
        "verdict",
        "exit code",
    ]
    return markdown(heads, rows)


def verified_demo() -> str:
    """The same of a real model, by what the probe was made on and what is served."""
    heads = ["probe on", "served", "from the adapted model", "scale", "verdict", "exit code"]
    return markdown(heads, [[row[head] for head in heads] for row in read("verify_demo")])


def served() -> str:
    """The demo's loss in minilora and in llama.cpp, by what the adapter was trained on."""
    rows = []
    for row in read("served"):
        rows.append([row["trained on"] or "no adapter", row["minilora"], row["llama.cpp"], row["difference"]])
    return markdown(["trained on", "minilora", "llama.cpp", "difference"], rows)


def views() -> str:
    """What PEFT's names cost, beside PEFT."""
    rows = [
        [f"{row['what']}, {row['side']}", amount(row["ms"], "ms"), row["ratio"], row["ratios"]] for row in read("views")
    ]
    return markdown(["", "time", "against without the names", "least and most"], rows)


def experts() -> str:
    """A step of one experts module beside PEFT's and beside the module alone: time, and memory."""
    rows = []
    for row in read("experts"):
        size = [
            f"{row['experts']}, {row['choices']}",
            f"{int(row['hidden']):,}",
            row["inner"],
            f"{int(row['tokens']):,}",
        ]
        times = [f"{three_digits(float(row[f'{side} ms']))} ms" for side in EXPERT_SIDES]
        shares = [row["peer / ours"], row["ours / frozen"], row["packed / frozen"]]
        rows.append([*size, *times, *shares, row["memory ours / peer"], row["memory packed / frozen"]])
    heads = [
        "E, k",
        "H",
        "I",
        "tokens",
        "minilora",
        "PEFT",
        "frozen",
        "NF4 + LoRA",
        "PEFT / minilora",
        "minilora / frozen",
    ]
    return markdown([*heads, "NF4 / frozen", "peak of a step, minilora / PEFT", "layer and peak, NF4 / frozen"], rows)


EXPERT_SIDES = ("ours", "peer", "frozen", "packed")


def experts_run() -> str:
    """Losses of a small mixture before and after, packed, loaded and merged."""
    rows = [[row["what"], row["loss"], row["logits differ from PEFT's by"]] for row in read("experts_run")]
    return markdown(["", "held-out loss (nats per byte)", "logits differ from PEFT's by"], rows)


def job(file: str) -> str:
    """A whole fine-tuning in minilora and in TRL: medians with the least and the most, and minilora's share of TRL's."""
    rows, lines = [], read(file)
    for name in dict.fromkeys(row["set"] for row in lines):
        ours, theirs = (next(row for row in lines if row["set"] == name and row["side"] == side) for side in JOB_SIDES)
        for row in (ours, theirs):
            rows.append([f"{name}, {row['steps']} steps", row["side"], *(job_cell(row, key) for key in JOB_KEYS)])
        *ratios, losses = [(float(ours[key]), float(theirs[key])) for key in JOB_KEYS]
        rows.append([name, "minilora / TRL", *(f"{a / b:.2f}" for a, b in ratios), f"{losses[0] - losses[1]:+.3f}"])
    heads = ["data", "", "wall time (s)", "processor (s)", "peak (MB)", "held-out loss"]
    return markdown(heads, rows)


def job_cell(row: Row, key: str) -> str:
    """A median, with the least and the most where they tell something of their own."""
    middle = row[key] if key == "held_out_loss" else three_digits(float(row[key]))
    return f"{middle} ({row[f'{key}_range'].replace(' to ', '-')})" if key in ("wall_s", "held_out_loss") else middle


def consumers() -> str:
    """Adapters in the programs that serve them: the difference of the logits, or a number under which the refusal stands below."""
    lines, notes = read("consumers"), []
    programs = list(dict.fromkeys(row["program"] for row in lines))
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in lines:
        said = row["differs"]
        if row["refused"]:
            sentence = (
                f"{row['program']}: {row['refused']}".replace("_", "\\_").replace("|", "\\|").replace("<", "&lt;")
            )
            notes += [sentence] * (sentence not in notes)
            said = f"refused ({notes.index(sentence) + 1})"
        rows.setdefault((row["architecture"].replace("_", "\\_"), row["feature"], row["moved"]), {})[row["program"]] = (
            said
        )
    table = [[*head, *(cells.get(program, "") for program in programs)] for head, cells in rows.items()]
    listed = "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(notes, 1))
    return f"{markdown(['architecture', 'adapter', 'moves logits by', *programs], table)}\n\n{listed}"


JOB_SIDES = ("minilora", "TRL + PEFT + bitsandbytes")
JOB_KEYS = ("wall_s", "cpu_s", "peak_mb", "held_out_loss")

TABLES: dict[str, Callable[[], str]] = {
    "cpu": lambda: speed("cpu"),
    "cpu, two threads": lambda: speed("cpu_2_threads"),
    "cpu, without bf16": lambda: speed("cpu_no_bf16"),
    "consumers": consumers,
    "cost": cost,
    "experts": experts,
    "experts, a run": experts_run,
    "formats": formats,
    "gguf decode": gguf_decode,
    "loading": loading,
    "store": store,
    "served": served,
    "verify": verified,
    "verify_demo": verified_demo,
    "head loss": head_loss,
    "job": lambda: job("job"),
    "job, packed by both": lambda: job("job_packed"),
    "kernels, H200": lambda: on_a_gpu("nvidia_h200"),
    "packing": packing,
    "sweep": lambda: sweeps(["sweep"]),
    "sweep, workers": workers,
    "sweep, H200": lambda: sweeps(["sweep_nvidia_h200"]),
    "views": views,
    **{f"kernels, Triton {version}": lambda version=version: kernels(version) for version in ("3.6", "3.7", "3.9")},
}


# ---- the comparison in the README


def guaranteed(about: str, column: str) -> str:
    """The cell of the table of ``docs/guarantees.md`` whose row begins with ``about``, under the head ``column``."""
    heads: list[str] = []
    for line in (DOCS / "guarantees.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if column in cells:
            heads = cells
        elif cells and heads and cells[0].startswith(about):
            return cells[heads.index(column)]
    raise LookupError(f"docs/guarantees.md has no row {about!r} under {column!r}")


def comparison() -> str:
    """Why not PEFT + bitsandbytes: a row each, each figure from where it was written down, the better one in bold."""

    def cpu(what: str, setting: str = "", name: str = "cpu") -> list[str]:
        row = find(name, what, setting)
        return best(
            [(float(row[f"{side} cpu median"]), figure(name, what, side, setting)) for side in ("peer", "ours")]
        )

    def kl(*names: str) -> list[str]:
        found = [float(find("formats", name)["SmolLM2-135M KL"]) for name in names]
        return best([(value, three_digits(value)) for value in found])

    def load(*ways: str) -> list[str]:
        rows = [find("loading", way) for way in ways]
        said = [f"{row['seconds']} s, at most {float(row['peak']):.0f} MiB" for row in rows]
        return best([(float(row["seconds"]), words) for row, words in zip(rows, said, strict=True)])

    def job(key: str, unit: str) -> list[str]:
        rows = {row["side"]: float(row[key]) for row in read("job_packed")}
        return best([(rows[side], f"{three_digits(rows[side])} {unit}") for side in reversed(JOB_SIDES)])

    def kept(about: str) -> list[str]:
        said = [guaranteed(about, column) for column in ("PEFT and transformers", "minilora")]
        return best([(int(words.split(" of ")[0]), words) for words in said])

    decode = "dequantize, bit-exact, into a kept buffer"
    layers = find("cpu", "QLoRA step, fp32")["setting"].split(", ")[1]  # "12 of 30 layers"
    few = find("cpu_no_bf16", "LoRA step, bf16")["setting"].split(", ")[1]
    rows = [
        [f"a QLoRA step of SmolLM2 in fp32 ({layers})", *cpu("QLoRA step, fp32")],
        [
            f"a LoRA step in bf16 ({few}), on a processor without bf16 instructions",
            *cpu("LoRA step, bf16", name="cpu_no_bf16"),
        ],
        [
            "a whole fine-tuning on answers of unlike lengths, from start to saved adapter (TRL, packed, with PEFT)",
            *job("cpu_s", "s"),
        ],
        ["its peak memory", *job("peak_mb", "MB")],
        ["decoding a 4-bit weight of 4096 × 4096", *cpu(decode, "4096x4096")],
        ["decoding a 4-bit weight of 576 × 576", *cpu(decode, "576x576")],
        ["memory that the first QLoRA step adds to the loaded model", *cpu("peak memory of a QLoRA step")],
        ["loading a bf16 model of 406 million weights into NF4", *load("bitsandbytes", "minilora")],
        [
            "error of SmolLM2 in 4.127 bits per weight (KL divergence)",
            *kl("NF4, double quantization", "NF4, weighted, signed"),
        ],
        ["switching between two adapters of 224 layers", *cpu("switching adapters")],
        ["a save that is killed: the adapter is lost or mixed", *kept("A save that is killed")],
        ["a flipped bit in an adapter's files: it is loaded all the same", *kept("A damaged adapter")],
    ]
    return markdown(["what", "PEFT + bitsandbytes", "minilora"], rows)


def best(sides: Sequence[tuple[float, str]]) -> list[str]:
    """The words of each side, the smallest value's in bold unless another one comes within 5 % of it."""
    smallest, second = sorted(value for value, _ in sides)[:2]
    clear = second > 1.05 * smallest
    return [f"**{words}**" if clear and value == smallest else words for value, words in sides]


def with_comparison(text: str) -> str:
    """The README's text with the comparison between its two marks."""
    before, _, rest = text.partition("<!-- comparison -->\n")
    _, found, after = rest.partition("<!-- end of comparison -->")
    if not found:
        raise LookupError("README.md has no <!-- comparison --> and <!-- end of comparison -->")
    return f"{before}<!-- comparison -->\n{comparison()}\n<!-- end of comparison -->{after}"


if __name__ == "__main__":
    README.write_text(with_comparison(README.read_text(encoding="utf-8")), encoding="utf-8")

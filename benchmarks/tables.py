"""What a benchmark prints: the lines of its CSV file as a Markdown table. The tables of the docs are made by ``docs/tables.py``."""

from __future__ import annotations

from typing import Any


def cpu_table(lines: list[dict[str, Any]]) -> str:
    """What is measured, both sides in processor time with their range, the ratio, and whether the goal is reached."""
    said = ["| what | threads | minilora | peft / bitsandbytes | ratio (wall) | goal |", "|---|---|---|---|---|---|"]
    for line in lines:
        sides = [
            f"{line[f'{s} cpu median']} ({line[f'{s} cpu min']}-{line[f'{s} cpu max']}) {line['unit']}"
            for s in ("ours", "peer")
        ]
        floors = (
            f"; frozen {line['floor cpu median']} / {line['peer floor cpu median']} ms"
            if line["kind"] == "overhead"
            else ""
        )
        goal = line["goal"].replace(">=", "≥").replace("<=", "≤") + ("" if line["reached"] else ", missed")
        setting = f"{line['what']} ({line['setting']}{floors})"
        ratio = f"{line['ratio cpu']} ({line['ratio wall']})"
        said.append(f"| {setting} | {line['threads']} | {' | '.join(sides)} | {ratio} | {goal} |")
    return "\n".join(said)


def formats_table(table: list[dict[str, Any]]) -> str:
    """A format a line: its bits, its error on normal weights, and each model's divergence with its range."""
    names = ("byte model", "SmolLM2-135M")
    lines = [
        "| format | bits | RMSE, N(0,1) | " + " | ".join(f"KL, {name} (range)" for name in names) + " |",
        "|---|---|---|---|---|",
    ]
    for row in table:
        cells = [f"{row[f'{n} KL']:.4f} ({row[f'{n} KL min']:.4f}-{row[f'{n} KL max']:.4f})" for n in names]
        lines.append(f"| {row['format']} | {row['bits']:.3f} | {row['rmse_normal']:.4f} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)

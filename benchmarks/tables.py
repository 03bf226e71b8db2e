"""The tables of the README, as Markdown made from the lines of the CSV files; ``--readme`` puts them into their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from record import ROOT


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


def into_readme(name: str, table: str, readme: Path = ROOT / "README.md") -> None:
    """Put a table between ``<!-- name -->`` and ``<!-- /name -->``. Raises ``ValueError`` if the README has no such place."""
    text = readme.read_text(encoding="utf-8")
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(first) != 1 or text.count(last) != 1:
        raise ValueError(f"{readme}: wanted one {first} and one {last}")
    before, rest = text.split(first)
    readme.write_text(f"{before}{first}\n{table}\n{last}{rest.split(last)[1]}", encoding="utf-8")

"""What ``aot.py`` reads off machine code: resources, instructions, and the loop that does the work."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import triton


def tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def nvidia(cubin: bytes) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """Resources of a cubin, and its instructions as ``(address, text)``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True
        ).stdout
        sass = subprocess.run([tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True).stdout
    pairs = re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    if not pairs or not lines:
        raise RuntimeError(f"cuobjdump gave nothing to read: {usage[-300:]!r}")
    return {name.lower(): int(value) for name, value in pairs}, [(int(at, 16), text) for at, text in lines]


def amd(assembly: str) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """The same from AMD assembly; labels become addresses."""
    facts = {
        "reg": r"\.vgpr_count:\s+(\d+)",
        "stack": r"\.private_segment_fixed_size:\s+(\d+)",
        "local": r"\.vgpr_spill_count:\s+(\d+)",
    }
    found = {name: int(re.search(pattern, assembly).group(1)) for name, pattern in facts.items()}  # type: ignore[union-attr]
    lines: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"(\.?L\w+):", line):
            labels[label.group(1)] = len(lines)
        elif (text := line.split(";")[0].strip()) and line.startswith("\t") and not text.startswith("."):
            lines.append((len(lines), text))
    return found, [
        (at, re.sub(r"\.?LBB\w+", lambda m: hex(labels.get(m.group(), 1 << 40)), text)) for at, text in lines
    ]


def main_loop(lines: list[tuple[int, str]], tensor: str) -> list[str]:
    """Instructions of the loop with most tensor-core instructions, the shortest of several; a jump back makes a loop."""
    where = {at: i for i, (at, _) in enumerate(lines)}
    end = max((i for i, (_, text) in enumerate(lines) if "EXIT" in text), default=len(lines))
    loops = []
    for i, (at, text) in enumerate(
        lines[:end]
    ):  # what stands after the end are waits moved out of the way, which jump back
        jump = re.search(r"\b(?:BRA|s_c?branch\w*)\b.*?(0x[0-9a-f]+)", text)
        if jump and int(jump.group(1), 16) < at and int(jump.group(1), 16) in where:
            loops.append([text for _, text in lines[where[int(jump.group(1), 16)] : i + 1]])
    return max(loops, key=lambda body: (sum(tensor in text for text in body), -len(body)), default=[])

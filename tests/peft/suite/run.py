"""PEFT's own LoRA tests on minilora: ``python tests/peft/suite/run.py CHECKOUT`` runs them and writes ``docs/peft-tests.md``.

CHECKOUT is a folder of https://github.com/huggingface/peft at the tag of the installed peft; the models that the tests name come from the
Hub's cache. Files can be named after it (then no page is written). What fails is run once more with PEFT itself: what fails there too does
not count, and neither do skipped tests and tests of other methods.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from reasons import INTERNAL, OPEN, OUT_OF_SCOPE, SCOPE, STRICTER, WORDS, WORKS, reason

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "peft-tests.md"
# What the first comparison of the two libraries called the core: plain LoRA on linear layers and embeddings.
NOT_CORE = (
    *OUT_OF_SCOPE,
    "target_parameters",
    "convolutions",
    "nn.MultiheadAttention",
    "aLoRA",
    "CorDA",
    "EVA",
    "LoRA-GA",
    "MiCA",
    "VeRA",
)
KINDS = (STRICTER, WORKS, WORDS, INTERNAL, SCOPE, OPEN)


def run(checkout: Path, files: list[Path], which: str, out: Path, only: Path | None = None) -> list[dict[str, Any]]:
    """The results of these files of tests in one process, a dictionary a test; pytest shows how far it is."""
    environment = os.environ | {
        "SUITE_WITH": which,
        "SUITE_OUT": str(out),
        "SUITE_ROOT": str(checkout),
        "SUITE_ONLY": str(only or ""),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[2]), str(HERE.parents[2] / "kernels")]),
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "plugin",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--tb=no",
        "-r",
        "N",
    ]
    command += [f"--rootdir={checkout}", "-W", "ignore", "--continue-on-collection-errors", *map(str, files)]
    done = subprocess.run(command, env=environment, cwd=checkout)
    if done.returncode not in (0, 1, 5):
        print(f"pytest ended with {done.returncode} under {which}", file=sys.stderr)
    return list({each["id"]: each for each in map(json.loads, out.read_text().splitlines())}.values())


def judged(checkout: Path, files: list[Path], folder: Path) -> list[dict[str, Any]]:
    """Each test with its ``kind``: passed, skipped, excluded, or why it fails."""
    tests = run(checkout, files, "minilora", folder / "minilora.jsonl")
    failed = [each for each in tests if each["outcome"] == "failed"]
    (folder / "failed.txt").write_text("\n".join(each["id"] for each in failed))
    theirs = run(checkout, files, "peft", folder / "peft.jsonl", folder / "failed.txt") if failed else []
    passing = {each["id"] for each in theirs if each["outcome"] == "passed"}
    for each in tests:
        each["kind"], each["why"] = each["outcome"], ""
        if each["outcome"] == "failed":
            each["kind"], each["why"] = reason(each) if each["id"] in passing else ("excluded", "")
    return tests


def share(tests: list[dict[str, Any]]) -> str:
    counted = [each for each in tests if each["kind"] not in ("skipped", "excluded")]
    passed = sum(each["kind"] == "passed" for each in counted)
    return f"{passed:,} of {len(counted):,} ({passed / len(counted):.0%})" if counted else "none"


def _rest(tests: list[dict[str, Any]]) -> str:
    """Each kind of what does not pass with its count."""
    counts = collections.Counter(each["kind"] for each in tests)
    return ", ".join(f"{counts[kind]:,} *{kind}*" for kind in KINDS if counts[kind])


def page(tests: list[dict[str, Any]], seconds: float) -> str:
    """The page of the docs."""
    core = [each for each in tests if not set(each["features"]) & set(NOT_CORE)]
    lines = [
        "# PEFT's own tests",
        "",
        f"PEFT {version('peft')}'s tests of LoRA, run with minilora in PEFT's place (`python tests/peft/suite/run.py CHECKOUT`, "
        f"{seconds / 60:.0f} minutes). A test counts if it passes on PEFT here and is about LoRA alone. "
        "*Core* is plain LoRA on linear layers and embeddings.",
        "",
        f"**Core: {share(core)} pass. All: {share(tests)}.** What does not pass, of the core: {_rest(core)}. Of all: {_rest(tests)}.",
        "",
        "| file | core | all | " + " | ".join(KINDS) + " |",
        "|---|---|---|" + "---|" * len(KINDS),
    ]
    for file in dict.fromkeys(each["file"] for each in tests):
        own = [each for each in tests if each["file"] == file]
        counts = collections.Counter(each["kind"] for each in own)
        own_core = [each for each in core if each["file"] == file]
        lines.append(
            f"| {file} | {share(own_core)} | {share(own)} | "
            + " | ".join(str(counts[kind] or "") for kind in KINDS)
            + " |"
        )
    lines += ["", "## Why the others do not pass", "", "| kind | reason | tests | of the core |", "|---|---|---|---|"]
    why = collections.Counter((each["kind"], each["why"]) for each in tests if each["kind"] in KINDS)
    why_core = collections.Counter((each["kind"], each["why"]) for each in core)
    for (kind, text), count in sorted(why.items(), key=lambda item: (KINDS.index(item[0][0]), -item[1])):
        lines.append(f"| {kind} | {text} | {count} | {why_core[kind, text] or ''} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("files", nargs="*", help="names of files in its tests folder; default: all that are about LoRA")
    parser.add_argument("--out", type=Path, default=Path("build/peft-suite"), help="where the results of each test go")
    options = parser.parse_args()
    tests_folder = options.checkout.resolve() / "tests"
    if not tests_folder.is_dir():
        parser.error(f"{options.checkout}: no folder with PEFT's tests; git clone https://github.com/huggingface/peft")
    options.out.mkdir(parents=True, exist_ok=True)
    names = options.files or sorted(
        each.name
        for each in tests_folder.glob("test_*.py")
        if re.search(r"lora|\bvera", each.read_text().lower()) and "gpu" not in each.name
    )
    began = time.time()
    tests = judged(options.checkout.resolve(), [tests_folder / name for name in names], options.out.resolve())
    (options.out / "tests.json").write_text(json.dumps(tests))
    print(f"all: {share(tests)}")
    if not options.files:
        PAGE.write_text(page(tests, time.time() - began))
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()

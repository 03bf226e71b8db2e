"""What several verbs share: the flags of a job that is only tried, and where its page goes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora.errors import ConfigError


def add_job_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``plan`` and ``bench`` alike."""
    parser.add_argument("--model", default="smollm2", help="hub id, local folder, or smollm2 (default: %(default)s)")
    parser.add_argument("--r", type=int, default=8, help="rank (default: %(default)s)")
    parser.add_argument("--target-modules", nargs="+", default=["all-linear"], help="names, one regex, or all-linear")
    parser.add_argument("--quant", default="none", help="none or nf4 (default: %(default)s)")
    parser.add_argument("--double-quant", action=argparse.BooleanOptionalAction, default=True, help="8-bit scales")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="examples of a batch (default: %(default)s)")
    parser.add_argument("--seq", type=int, default=128, help="tokens of an example (default: %(default)s)")
    parser.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations in the backward pass",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="of torch; 0 as the machine gives (default: %(default)s)"
    )
    parser.add_argument("--html", metavar="FILE", help="write the table and its bars as a page, too")


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of these flags, as ``PlanJob`` takes them; one target that is no plain name is a regex or "all-linear"."""
    names = ("model", "r", "quant", "double_quant", "dtype", "batch", "seq", "gradient_checkpointing", "threads")
    given = arguments.target_modules
    alone = len(given) == 1 and (given[0] == "all-linear" or not given[0].replace("_", "").isalnum())
    return {name: getattr(arguments, name) for name in names} | {"target_modules": given[0] if alone else tuple(given)}


def check_page(file: str | None) -> None:
    """Refuse a page that cannot be written before hours of work, not after. Raises ``ConfigError``."""
    if file and Path(file).is_dir():
        raise ConfigError(f"--html={file!r} is a folder; wanted a file")


def title_of(job: Any) -> str:
    """The job in a line."""
    quant = f"{job.quant}{', double quantization' * job.double_quant}" if job.quant != "none" else "not quantized"
    targets = job.target_modules if isinstance(job.target_modules, str) else ", ".join(job.target_modules)
    extra = ", activations recomputed" * job.gradient_checkpointing
    extra += f", {job.threads} thread{'s' * (job.threads > 1)}" if job.threads else ""
    return f"{job.model}: r={job.r} on {targets}, {quant}, {job.dtype}, batch {job.batch} x {job.seq} tokens{extra}"


def write_page(
    file: str, title: str, subtitle: str, tiles: Sequence[dict[str, str]], columns: Sequence[str], rows: Sequence[Any],
    notes: Sequence[str], losses: dict[str, Sequence[float]] | None = None, settings: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Draw the page of ``page.as_page`` into ``file``; its folder is made."""
    from minilora.files.io import write_file
    from minilora.report.page import as_page

    place = Path(file)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_file(place, as_page(title, subtitle, tiles, columns, rows, notes, losses, settings))
    print(f"\n{place}: open it in a browser")

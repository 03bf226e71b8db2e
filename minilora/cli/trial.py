"""What several verbs share: the flags of a job that is only tried, and where its page goes."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.say import say
from minilora.errors import ConfigError
from minilora.hf.places import DTYPE_CHOICES, QUANT_CHOICES
from minilora.hf.trials import PlanJob

_GROUPS = {
    "model": ("model", "quant", "double_quant", "device", "dtype", "attention", "trust_remote_code"),
    "data": ("batch", "seq"),
    "adapter": ("r", "target_modules"),
    "training": ("gradient_checkpointing", "threads"),
}
_CHOICES = {"quant": QUANT_CHOICES, "dtype": DTYPE_CHOICES}


def add_job_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``plan`` and ``bench`` alike."""
    add_plugin_flag(parser)
    every = fields_of(PlanJob, model="smollm2", target_modules=("all-linear",))
    every |= {name: dataclasses.replace(every[name], choices=words) for name, words in _CHOICES.items()}
    for group, names in _GROUPS.items():
        add_flags(parser, group, [every[name] for name in names])
    add_flags(parser, "output", [Flag("html", str, None, "write the table and its bars as a page, too")])


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of these flags, as ``PlanJob`` takes them; one target that is no plain name is a regex or "all-linear"."""
    names = [name for group in _GROUPS.values() for name in group if name != "target_modules"]
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
    return f"{job.model}: r={job.r} on {targets}, {quant}, {job.dtype} on {job.device}, batch {job.batch} x {job.seq} tokens{extra}"


def write_page(
    file: str, title: str, subtitle: str, tiles: Sequence[dict[str, str]], columns: Sequence[str], rows: Sequence[Any],
    notes: Sequence[str], losses: dict[str, Sequence[float]] | None = None, settings: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Draw the page of ``page.as_page`` into ``file``; its folder is made."""
    from minilora.files.write import write_file
    from minilora.report.page import as_page

    place = Path(file)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_file(place, as_page(title, subtitle, tiles, columns, rows, notes, losses, settings))
    say(f"\n{place}: open it in a browser")

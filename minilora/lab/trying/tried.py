"""A claim that was tried, with what came of it, and the file that keeps such: ``lab.json``.

The file is enough to build the page again, and to know which claims are still to be tried. Next file: ``lab/trying/tries.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from minilora.errors import CheckpointError
from minilora.files.parse import parse_json
from minilora.files.read import read_bytes
from minilora.files.write import write_file
from minilora.lab.ground.claim import Claim, Curve, Finding, Picture
from minilora.lab.trying.cells import pack, unpack

__all__ = ["JSON_FILE", "Tried", "digest", "processor", "read", "write"]

JSON_FILE = "lab.json"


@dataclass(frozen=True)
class Tried:
    """One claim and what came of it.

    Attributes:
        finding: None where the claim could not be tried, and then ``failed`` is why, in words. module: the claim's file, as
            "lab/claims/rank_lr". digest: of that file. steps: of every trial. seconds: that it took, runs shared with claims before it
            not counted. place: processor and version of torch.
    """

    claim: Claim
    module: str
    digest: str
    steps: int
    finding: Finding | None = None
    failed: str = ""
    seconds: float = 0.0
    place: str = ""

    def packed(self) -> dict[str, Any]:
        """As JSON can hold it."""
        fields = {name: getattr(self, name) for name in ("module", "digest", "steps", "failed", "seconds", "place")}
        found = None if self.finding is None else _packed(self.finding)
        return {"claim": dataclasses.asdict(self.claim), **fields, "finding": found}

    @classmethod
    def unpacked(cls, given: Mapping[str, Any]) -> Tried:
        """What ``packed`` was called on."""
        found = None if given["finding"] is None else _unpacked(given["finding"])
        return cls(**{**given, "claim": Claim(**given["claim"]), "finding": found})


def _packed(finding: Finding) -> dict[str, Any]:
    rows = [{name: pack(value) for name, value in row.items()} for row in finding.rows]
    picture = None if finding.picture is None else dataclasses.asdict(finding.picture)
    if picture is not None:
        picture["curves"] = [{"name": name, "points": pack(points)} for name, points in picture["curves"]]
    return {"verdict": finding.verdict, "said": finding.said, "rows": rows, "picture": picture}


def _unpacked(given: Mapping[str, Any]) -> Finding:
    rows = [{name: unpack(value) for name, value in row.items()} for row in given["rows"]]
    picture = given["picture"]
    if picture is not None:
        curves = [Curve(curve["name"], unpack(curve["points"])) for curve in picture["curves"]]
        picture = Picture(**{**picture, "curves": curves})
    return Finding(given["verdict"], given["said"], rows, picture)


def digest(module: ModuleType) -> str:
    """SHA-256 of a claim's file: a finding of another text is not this claim's."""
    return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()


def processor() -> str:
    """The processor's own name where the system says it, and torch's version."""
    lines: list[str] = []
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, torch {torch.__version__}"


def read(folder: Path) -> dict[str, Tried]:
    """What ``lab.json`` of a folder keeps, by name; nothing where there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / JSON_FILE
    if not path.exists():
        return {}
    try:
        content = parse_json(read_bytes(path, "the findings"))["claims"]
        return {name: Tried.unpacked(one) for name, one in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: holds no findings that can be read ({type(error).__name__}: {error}); restore it, or remove it and try again"
        ) from error


def write(folder: Path, every: Mapping[str, Tried]) -> None:
    """Put findings into ``lab.json``, in the order of their names. Raises ``WriteError``."""
    content = {"claims": {name: every[name].packed() for name in sorted(every)}}
    write_file(folder / JSON_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")

"""``minilora doctor``: what is wrong with an adapter folder, whoever made it, and what some server would make of it.

No GPU is needed, and no weight of the base: headers, the adapter's own tensors and the base's config say enough. The checks stand in
tables, one file for each thing that is looked at: tensors, names, config, base, surroundings. Each gives findings: a sentence, how bad it
is, and the way out. Next file: ``doctor/finding.py``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minilora.doctor import around, base, config, keys, tensors
from minilora.doctor.case import Case, read_case
from minilora.doctor.finding import FAULT, SEVERITIES, Finding
from minilora.doctor.foreign import Foreign, foreign_findings, read_foreign
from minilora.doctor.keys import blocks_of, spans
from minilora.doctor.place import PEFT, find
from minilora.errors import printable

__all__ = ["CHECKS", "Examined", "examine"]

CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    *tensors.CHECKS,
    *keys.CHECKS,
    *config.CHECKS,
    *base.CHECKS,
    *around.CHECKS,
)
_OF_ANY_METHOD = (*tensors.CHECKS, config.method, *around.CHECKS)


@dataclass(frozen=True)
class Examined:
    """What was found: ``kind`` in words, ``facts`` by name, ``findings`` with the worst first."""

    folder: str
    kind: str
    facts: dict[str, str]
    findings: list[Finding] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How many findings of each severity."""
        found = Counter(finding.severity for finding in self.findings)
        return {severity: found[severity] for severity in SEVERITIES}

    @property
    def healthy(self) -> bool:
        """Whether there is no fault."""
        return not self.counts[FAULT]

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self) | {"counts": self.counts}


def examine(
    folder: str | os.PathLike[str], model: str | None = None, template: str = "", more: Sequence[Finding] = ()
) -> Examined:
    """Look at an adapter: a folder, or one of its files.

    Args:
        model: the base, by its config; None for the one that the adapter names, where it is on this disk. template: SHA-256 of the chat
            template that it was trained with, where a run remembers it. more: findings of the caller's.

    Raises:
        CheckpointError: it is no adapter, or its files are damaged; in one line.
    """
    place = find(Path(folder))
    if place.kind == PEFT:
        case = read_case(place, model, template)
        checks = _OF_ANY_METHOD if case.other_method else CHECKS
        found = [finding for check in checks for finding in check(case)]
        kind = printable(case.other_method)[:40] or ("VeRA" if _of_vera(case) else "LoRA")
        return Examined(
            str(folder), f"{kind} in PEFT's layout, {_made_by(case)}", _facts(case), _ordered([*more, *found])
        )
    foreign = read_foreign(place)
    return Examined(
        str(folder),
        f"adapter of {foreign.layout}",
        _foreign_facts(foreign),
        _ordered([*more, *foreign_findings(foreign)]),
    )


def _ordered(findings: Iterable[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


# ---- facts


def _made_by(case: Case) -> str:
    """Which program made it, as far as its traces go."""
    content, names = case.content, set(case.place.names)
    mapping, base = content.get("auto_mapping"), content.get("base_model_name_or_path")
    if "minilora.json" in names:
        return "by minilora"
    if (isinstance(mapping, dict) and "unsloth_fixed" in mapping) or str(base).startswith("unsloth/"):
        return "by unsloth, it seems"
    if {"axolotl_config.yml", "axolotl_config.yaml"} & names:
        return "by axolotl, it seems"
    version = content.get("peft_version")
    return f"by PEFT {version[:20]}" if isinstance(version, str) else "by PEFT or a program that writes its layout"


def _of_vera(case: Case) -> bool:
    """Whether the folder is of PEFT's type VERA, which has no ``lora_alpha``."""
    return case.content.get("peft_type") == "VERA"


def _facts(case: Case) -> dict[str, str]:
    base = case.content.get("base_model_name_or_path")
    known = (
        f" (config read from {case.base.place or case.base.name})" if case.base is not None else " (not on this disk)"
    )
    ranks = Counter(layer.r for layer in case.layers)
    scales = Counter(f"{layer.scaling:.4g}" for layer in case.layers) if case.plain else Counter()
    alpha = "" if _of_vera(case) else f" (lora_alpha {case.config.lora_alpha:g})"
    facts = {
        "base": f"{str(base)[:200]}{known}" if base else "not said",
        "layers": _layers(case),
        "rank": f"{_each(ranks)}; scaling {_each(scales)}{alpha}" if scales else _each(ranks),
        "size": _size(case.seen, sum(seen.bytes for seen in case.seen.values())),
        "proof": "probe.json is there: minilora verify asks a server with it"
        if "probe.json" in case.place.names
        else "",
    }
    return {name: text for name, text in facts.items() if text}


def _layers(case: Case) -> str:
    """``60: q_proj, v_proj in blocks 0 to 29``; kinds that lie in the same blocks together."""
    groups: dict[str, list[str]] = {}
    for kind, blocks in blocks_of(case).items():
        numbers = [block for block in blocks if block is not None]
        groups.setdefault(f" in block{'s' * (len(set(numbers)) > 1)} {spans(numbers)}" if numbers else "", []).append(
            kind
        )
    return f"{len(case.layers)}: " + "; ".join(
        f"{', '.join(kinds[:12])}{where}" for where, kinds in list(groups.items())[:6]
    )


def _each(counts: Counter[Any]) -> str:
    """The value that all have, or each with how many have it."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{value} ({count})" for value, count in counts.most_common(6)) + " ..." * (len(counts) > 6)


def _size(seen: Any, size: int) -> str:
    from minilora.report.tables import human_bytes

    kinds = Counter(one.dtype for one in seen.values())
    return f"{sum(one.numbers for one in seen.values()):,} numbers in {_each(kinds)}, {human_bytes(size)}"


def _foreign_facts(case: Foreign) -> dict[str, str]:
    parameters = case.content.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else case.content.get("adapter.lora.alpha")
    called = "scale" if isinstance(parameters, dict) else "alpha"
    return {
        "layers": str(len(case.pairs)),
        "rank": _each(Counter(case.ranks.values())) + (f"; {called} {str(scale)[:20]}" if scale is not None else ""),
        "size": _size(case.seen, sum(seen.bytes for seen in case.seen.values())),
    }

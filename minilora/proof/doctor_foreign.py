"""Adapters in the layouts of other programs: mlx-lm's folders, and the single files of diffusers and of kohya's scripts. It is said what
they are, and what is wrong in their tensors. Next file: ``proof/doctor.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minilora.errors import CheckpointError
from minilora.files.tensors import tensors_of_files
from minilora.proof.doctor_case import Seen, see
from minilora.proof.doctor_place import MLX, Place, read_json
from minilora.proof.finding import FAULT, NOTE, WARNING, Finding, named
from minilora.store.adapter_files import CONFIG_FILE, PREFIX
from minilora.training.progress import busy

__all__ = ["Foreign", "foreign_findings", "read_foreign"]


@dataclass(frozen=True)
class Layout:
    """How a program calls the two factors of a layer: endings of their names, and where each has its rank."""

    name: str
    down: str
    up: str
    rank_at: int = 0  # of ``down``


_LAYOUTS = (
    Layout("kohya's scripts", ".lora_down.weight", ".lora_up.weight"),
    Layout("diffusers, as it was before PEFT", ".lora.down.weight", ".lora.up.weight"),
    Layout("diffusers, as it was before PEFT", "_lora.down.weight", "_lora.up.weight"),
    Layout("mlx-lm", ".lora_a", ".lora_b", 1),
    Layout("diffusers", ".lora_A.weight", ".lora_B.weight"),
)
_PARTS = re.compile(r"^(unet|transformer|text_encoder(_[23])?)\.")


@dataclass(frozen=True)
class Foreign:
    """Such an adapter: whose ``layout``, how each layer's factors are called (None for a missing one), its config and metadata."""

    place: Place
    layout: str
    pairs: dict[str, tuple[str | None, str | None]]
    ranks: dict[str, int]
    seen: dict[str, Seen]
    content: dict[str, Any]
    metadata: Mapping[str, str]


def read_foreign(place: Place) -> Foreign:
    """Read it all, a tensor at a time. Raises ``CheckpointError`` for a damaged file, and for one that holds no adapter."""
    content = read_json(place.folder / CONFIG_FILE) if place.kind == MLX else {}
    with tensors_of_files([place.weights]) as tensors:
        layout, pairs = _pairs(list(tensors.shapes))
        if layout is None:
            some = next(iter(tensors.shapes), "none at all")
            said = f"no adapter in it: {len(tensors.shapes):,} tensors, such as {some[:200]}"
            raise CheckpointError(f"{place.weights}: {said}; wanted the factors of one")
        with busy(f"reading {place.weights.name}", len(tensors.shapes)) as tick:
            seen = {}
            for name in tensors.shapes:
                seen[name] = see(tensors.read(name))
                tick()
        metadata = tensors.metadata
    ranks = {
        path: seen[down].shape[layout.rank_at]
        for path, (down, _) in pairs.items()
        if down is not None and len(seen[down].shape) > layout.rank_at
    }
    called = layout.name
    if called == "diffusers" and any(name.startswith(PREFIX) for name in seen):
        called = "PEFT (its config is missing)"
    elif called == "diffusers" and not any(_PARTS.match(name) for name in seen):
        called = "PEFT's names without its prefix"
    return Foreign(place, called, pairs, ranks, seen, content or {}, metadata)


def _pairs(names: list[str]) -> tuple[Layout | None, dict[str, tuple[str | None, str | None]]]:
    """The layout that these names have, and the factors of each layer."""
    for layout in _LAYOUTS:
        downs = {name.removesuffix(layout.down): name for name in names if name.endswith(layout.down)}
        ups = {name.removesuffix(layout.up): name for name in names if name.endswith(layout.up)}
        if downs or ups:
            return layout, {path: (downs.get(path), ups.get(path)) for path in {**downs, **ups}}
    return None, {}


# ---- checks


def foreign_findings(case: Foreign) -> Iterator[Finding]:
    """What is wrong in its tensors, and how it is to be used."""
    bad = [name for name, seen in case.seen.items() if not math.isfinite(seen.largest)]
    if bad:
        said = f"{len(bad)} of {len(case.seen)} tensors hold NaN or infinity ({named(bad)}): the run had diverged"
        yield Finding(FAULT, "not finite", said, "go back to an earlier checkpoint")
    if hollow := [name for name, seen in case.seen.items() if not math.prod(seen.shape)]:
        yield Finding(FAULT, "empty", f"{named(hollow)}: no number in it", "save it again, with the weights gathered")
    if alone := [path for path, pair in case.pairs.items() if None in pair]:
        yield Finding(
            FAULT, "one factor", f"{named(alone)}: one of the two factors is missing", "save or copy it again"
        )
    whole = [pair for pair in case.pairs.values() if None not in pair]
    still = [up for _, up in whole if up is not None and case.seen[up].zero]
    if still and len(still) == len(whole):
        said = f"all {len(still)} layers change nothing: the second factor is still zero: never trained"
        yield Finding(FAULT, "untrained", said, "train it")
    elif still:
        said = f"{len(still)} of {len(whole)} layers change nothing ({named(still)})"
        yield Finding(WARNING, "untrained", said, "see whether gradients reach them")
    yield from _mlx(case) if case.place.kind == MLX else _single(case)


def _mlx(case: Foreign) -> Iterator[Finding]:
    """mlx-lm takes the scale from its config alone."""
    said = case.content.get("lora_parameters")
    parameters = said if isinstance(said, dict) else {}
    if not case.content or "scale" not in parameters or "rank" not in parameters:
        what = f"{CONFIG_FILE} says no rank and scale, and mlx-lm does not load the adapter without"
        yield Finding(FAULT, "config", what, "copy it from where the adapter was trained")
    elif odd := [path for path, rank in case.ranks.items() if rank != parameters["rank"]]:
        what = f"{named(odd)}: rank {case.ranks[odd[0]]} in the file, {str(parameters['rank'])[:20]} in the config"
        yield Finding(FAULT, "rank", what, "take config and weights from the same run")
    way = "use it in mlx-lm (mlx_lm.generate --adapter-path), or fuse it there (mlx_lm.fuse) and serve the model"
    yield Finding(NOTE, "layout", "an adapter of mlx-lm, whose layout neither PEFT, vLLM nor llama.cpp reads", way)


def _single(case: Foreign) -> Iterator[Finding]:
    """A file by itself."""
    if case.layout.startswith("PEFT"):
        what = f"the names are those of PEFT, and {CONFIG_FILE}, which has the scale, is not beside it"
        yield Finding(
            FAULT, "config", what, f"copy {CONFIG_FILE} from the run, and call this file adapter_model.safetensors"
        )
        return
    if case.layout.startswith("kohya"):
        lacking = [path for path in case.pairs if f"{path}.alpha" not in case.seen]
        if lacking:
            what = f"{named(lacking)}: no alpha, so programs scale by 1"
            yield Finding(NOTE, "scale", what, "nothing to do if the file was meant so")
    way = "use it in a program for pictures (pipe.load_lora_weights of diffusers, ComfyUI)"
    yield Finding(NOTE, "layout", f"one file of {case.layout}: no adapter of a language model in PEFT's layout", way)

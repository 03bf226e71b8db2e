"""Adapters in the layouts of other programs: mlx-lm's folders, llama.cpp's GGUF files, the single files of diffusers and of kohya's
scripts. It is said what they are, and what is wrong in their tensors. Next file: ``doctor/examine.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilora.doctor.case import Seen, see
from minilora.doctor.finding import FAULT, NOTE, WARNING, Finding, named
from minilora.doctor.place import GGUF, MLX, Place, read_json
from minilora.errors import CheckpointError
from minilora.files.tensors import tensors_of_files
from minilora.files.validate import shown
from minilora.gguf.file import open_gguf
from minilora.store.adapter_files import CONFIG_FILE, PREFIX
from minilora.training.progress import busy

__all__ = ["Foreign", "foreign_findings", "read_foreign"]


@dataclass(frozen=True)
class Layout:
    """How a program calls the two factors of a layer: endings of their names."""

    name: str
    down: str
    up: str


_LAYOUTS = (
    Layout("kohya's scripts", ".lora_down.weight", ".lora_up.weight"),
    Layout("diffusers, as it was before PEFT", ".lora.down.weight", ".lora.up.weight"),
    Layout("diffusers, as it was before PEFT", "_lora.down.weight", "_lora.up.weight"),
    Layout("mlx-lm", ".lora_a", ".lora_b"),
    Layout("diffusers", ".lora_A.weight", ".lora_B.weight"),
)
_PARTS = re.compile(r"^(unet|transformer|text_encoder(_[23])?)\.")


@dataclass(frozen=True)
class Foreign:
    """Such an adapter: whose ``layout``, how each layer's factors are called (None for a missing one), its config, or a GGUF's metadata."""

    place: Place
    layout: str
    pairs: dict[str, tuple[str | None, str | None]]
    ranks: dict[str, int]
    seen: dict[str, Seen]
    content: dict[str, Any]


def read_foreign(place: Place) -> Foreign:
    """Read it all, a tensor at a time. Raises ``CheckpointError`` for a damaged file, and for one that holds no adapter."""
    with _opened(place) as (names, read, content):
        layout, pairs = _pairs(names)
        if layout is None:
            said = f"no adapter in it: {len(names):,} tensors, such as {next(iter(names), 'none at all')[:200]}"
            raise CheckpointError(f"{place.weights}: {said}; wanted the factors of one")
        seen = {}
        with busy(f"reading {place.weights.name}", len(names)) as tick:
            for name in names:
                seen[name] = see(read(name))
                tick()
    shapes = {path: seen[down].shape for path, (down, _) in pairs.items() if down is not None}
    ranks = {path: shape[_rank_at(place.kind, path)] for path, shape in shapes.items() if len(shape) > 1}
    called = "llama.cpp" if place.kind == GGUF else layout.name
    if called == "diffusers" and any(name.startswith(PREFIX) for name in seen):
        called = "PEFT (its config is missing)"
    elif called == "diffusers" and not any(_PARTS.match(name) for name in seen):
        called = "PEFT's names without its prefix"
    return Foreign(place, called, pairs, ranks, seen, content)


@contextmanager
def _opened(place: Place) -> Iterator[tuple[list[str], Callable[[str], Tensor], dict[str, Any]]]:
    """The names of its tensors, what reads one of them, and what is said of the whole: the config, or a GGUF's metadata."""
    if place.kind != GGUF:
        content = read_json(place.folder / CONFIG_FILE) if place.kind == MLX else {}
        with tensors_of_files([place.weights]) as tensors:
            yield list(tensors.shapes), tensors.read, content or {}
        return
    with open_gguf(place.weights) as file:
        if file.said("general.type", str, "model") != "adapter":
            raise CheckpointError(
                f"{place.weights}: a model ({file.architecture[:50]}) and no adapter; it is served as it is"
            )
        plain = {name: info.kind.plain or torch.float32 for name, info in file.tensors.items()}
        yield list(file.tensors), lambda name: file.values(name, plain[name]), file.metadata


def _rank_at(kind: str, path: str) -> int:
    """The side of the first factor that is the rank: mlx-lm has it last, and llama.cpp of its table of tokens."""
    if kind == GGUF:  # of experts, they come first
        return -1 if path.startswith("token_embd") else -2
    return 1 if kind == MLX else 0


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
    yield from {MLX: _mlx, GGUF: _gguf}.get(case.place.kind, _single)(case)


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


def _gguf(case: Foreign) -> Iterator[Finding]:
    """What llama.cpp serves."""
    architecture, method = (case.content.get(name) for name in ("general.architecture", "adapter.type"))
    if method != "lora":
        what = f"adapter.type is {shown(method)}, and llama.cpp takes lora alone"
        yield Finding(FAULT, "method", what, "export it again: minilora export --for llama.cpp")
    for path, (down, up) in case.pairs.items():
        if path.startswith("token_embd") or down is None or up is None:
            continue
        shapes = [list(case.seen[name].shape) for name in (down, up)]
        if shapes[1][-1:] != [case.ranks.get(path)]:
            what = f"{path}: its factors {shapes[0]} and {shapes[1]} do not fit together"
            yield Finding(FAULT, "shapes", what, "export it again")
    way = "llama-server --model BASE.gguf --lora FILE, on a base of this architecture"
    yield Finding(NOTE, "layout", f"a GGUF LoRA for {shown(architecture)}, which llama.cpp and Ollama serve", way)


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

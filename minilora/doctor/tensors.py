"""Checks of the tensors alone: what never trained, what is broken, what a server could not hold. Next file: ``doctor/names.py``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from minilora.doctor.case import Case
from minilora.doctor.finding import FAULT, NOTE, WARNING, Finding, named

__all__ = ["CHECKS"]

_LARGEST = 65_504.0  # of fp16
_SMALLEST = 2.0**-25  # rounds to zero there
_FACTORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")


def empty(case: Case) -> Iterator[Finding]:
    """No tensor, or none with a number in it: what ZeRO-3 and FSDP leave on a rank that has only its shard."""
    way = "gather the weights before saving: deepspeed.zero.GatheredParameters, or FSDP's summon_full_params, around save_pretrained"
    if not case.seen:
        yield Finding(FAULT, "empty", "the weights file holds no tensor", f"train with it again, or {way}")
    hollow = [key for key, seen in case.seen.items() if not math.prod(seen.shape)]
    flat = [
        own[name]
        for own in case.parts.values()
        for name in own
        if name in _FACTORS and len(case.seen[own[name]].shape) < 2
    ]
    if odd := sorted({*hollow, *flat}):
        yield Finding(FAULT, "empty", f"{named(odd)}: no matrix, but what one process of a sharded run held of it", way)


def broken(case: Case) -> Iterator[Finding]:
    """NaN and infinity."""
    bad = [key for key, seen in case.seen.items() if not math.isfinite(seen.largest)]
    if bad:
        said = f"{len(bad)} of {len(case.seen)} tensors hold NaN or infinity ({named(bad)}): the run had diverged"
        yield Finding(
            FAULT,
            "not finite",
            said,
            "go back to an earlier checkpoint, and train with a lower learning rate from there",
        )


def unfit(case: Case) -> Iterator[Finding]:
    """Factors that cannot be multiplied with each other."""
    for path in case.unfit:
        shapes = [case.seen[key].shape for name, key in case.parts[path].items() if name in _FACTORS]
        if len(shapes) == 2 and all(len(shape) > 1 and math.prod(shape) for shape in shapes):
            said = f"{path}: its factors {list(shapes[0])} and {list(shapes[1])} do not fit together"
            yield Finding(FAULT, "shapes", said, "save the adapter again; files of two runs may be mixed here")


def untrained(case: Case) -> Iterator[Finding]:
    """Layers that are as the base is."""
    still = [layer.path for layer in case.layers if layer.untrained]
    if not still:
        return
    dead = [path for path in still if _all_zero(case, path)]
    more = " (A too, so that no gradient can ever reach them)" if dead and len(dead) == len(still) else ""
    if len(still) == len(case.layers):
        said = f"all {len(still)} layers change nothing: B is still zero{more}: never trained, or saved before the first step"
        yield Finding(
            FAULT,
            "untrained",
            said,
            "train it; if it was trained, the optimizer had other parameters than those that were saved",
        )
    else:
        said = f"{len(still)} of {len(case.layers)} layers change nothing, since a factor is all zeros{more} ({named(still)})"
        way = "see whether gradients reach them (frozen parts, a tower that the data does not use), or leave them out of target_modules"
        yield Finding(WARNING, "untrained", said, way)


def _all_zero(case: Case, path: str) -> bool:
    own = case.parts.get(path, {})
    return bool(own) and all(case.seen[own[name]].zero for name in _FACTORS if name in own)


def range_of_fp16(case: Case) -> Iterator[Finding]:
    """What a server in fp16 would turn into infinity, or into nothing."""
    found = {key: seen.largest for key, seen in case.seen.items() if math.isfinite(seen.largest)}
    if large := [key for key, largest in found.items() if largest > _LARGEST]:
        said = f"{named(large)}: values up to {max(found.values()):.3g} are infinite in fp16, whose largest is 65,504"
        yield Finding(
            WARNING,
            "fp16",
            said,
            "serve it in bfloat16 or float32, and look at the run: such values mean that it diverged",
        )
    scaled = []
    for layer in case.layers:
        B = case.parts.get(layer.path, {}).get("lora_B.weight")
        if B in found and found[B] <= _LARGEST < abs(layer.scaling) * found[B]:
            scaled.append(layer.path)
    if scaled:
        said = f"{named(scaled)}: the scaling times B is infinite in fp16, and programs that fold the scale into B overflow"
        yield Finding(WARNING, "fp16", said, "serve it in bfloat16 or float32")
    if small := [key for key, largest in found.items() if 0 < largest < _SMALLEST]:
        said = f"{named(small)}: every value is zero in fp16 (at most {max(found[key] for key in small):.1g})"
        yield Finding(
            WARNING, "fp16", said, "serve it in bfloat16 or float32; so small an update hardly changes the base"
        )


def dtypes(case: Case) -> Iterator[Finding]:
    """More than one number format, or one that no program multiplies with."""
    counts = Counter(
        case.seen[key].dtype for own in case.parts.values() for name, key in own.items() if name in _FACTORS
    )
    if odd := [kind for kind in counts if not kind.startswith(("float", "bfloat"))]:
        yield Finding(
            FAULT,
            "dtype",
            f"factors in {named(odd)}, which no program multiplies with",
            "save the adapter again as float32",
        )
    elif len(counts) > 1:
        said = f"factors in {', '.join(f'{kind} ({count})' for kind, count in counts.most_common())}: programs cast them to one"
        yield Finding(NOTE, "dtype", said, "nothing to do, unless it surprises you")


CHECKS = (empty, broken, unfit, untrained, range_of_fp16, dtypes)

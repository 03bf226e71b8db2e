"""Checks of names: tensors that nobody looks for, fields that promise tensors which are not there, layers left out. Names in a config are
compared as names; an expression of a file is never run. Next file: ``doctor/config.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from minilora.doctor.case import MOST_NAMES, Case
from minilora.doctor.finding import FAULT, NOTE, WARNING, Finding, named
from minilora.lora.targets import endings, ends_with
from minilora.store.adapter_files import PREFIX, PROJECTIONS
from minilora.store.contents import part_of
from minilora.store.tables import table_of

__all__ = ["CHECKS", "EMBEDDINGS", "blocks_of", "halves", "spans"]

EMBEDDINGS = (
    "embed_tokens",
    "lm_head",
    "wte",
    "word_embeddings",
    "embed_in",
    "embed_out",
    "tok_embeddings",
    "shared",
    "output",
)
_HEADS = ("classifier", "score")  # PEFT writes both, whichever the model has
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
_SHOWN = 6  # blocks in a sentence


def wrong_names(case: Case) -> Iterator[Finding]:
    """Names that no program looks for."""
    for fault, keys in case.faults.items():
        count = f"{len(keys)} of {len(case.seen)} tensors are called wrong"
        said = f"{count}: {fault.why} ({named(keys[:1])}); servers skip such names in silence"
        yield Finding(
            FAULT,
            f"names: {fault.check}",
            said,
            "save it anew with save_pretrained of the PeftModel, or rename the tensors",
        )


def one_factor(case: Case) -> Iterator[Finding]:
    """A without B, or B without A."""
    for (has, lacks), alone in halves(case).items():
        pair = " without ".join(name.removesuffix(".weight") for name in (has, lacks))
        said = f"{named(alone)}: {pair}, so the layer cannot be built"
        yield Finding(FAULT, "one factor", said, "save or copy the adapter again; a part of the file is missing")


def halves(case: Case) -> dict[tuple[str, str], list[str]]:
    """The factor that is there and the one that is not, to the layers where it is so."""
    pairs = [pair for first, second in _PAIRS for pair in ((first, second), (second, first))]
    found = {
        (has, lacks): [path for path, own in case.parts.items() if has in own and lacks not in own and not _is_xs(own)]
        for has, lacks in pairs
    }
    return {pair: alone for pair, alone in found.items() if alone}


def _is_xs(own: dict[str, str]) -> bool:
    return any(name.startswith(("lora_xs", "vera")) for name in own)


def ranks(case: Case) -> Iterator[Finding]:
    """The config's rank and the file's."""
    if not case.plain or case.content.get("target_parameters"):
        return
    odd = [layer for layer in case.layers if layer.r != case.config.for_module(layer.path)[0] and not layer.experts]
    if odd:
        said = (
            f"{len(odd)} of {len(case.layers)} layers have another rank in the file than in the config ({odd[0].path}: {odd[0].r}, the "
            f"config says {case.config.for_module(odd[0].path)[0]}): PEFT refuses to load them, others scale them wrong"
        )
        yield Finding(
            FAULT,
            "rank",
            said,
            "take config and weights from the same save; a pruned or resized adapter needs its rank_pattern",
        )


def targets_unserved(case: Case) -> Iterator[Finding]:
    """Names in ``target_modules`` without a tensor."""
    served = {end for path in case.parts for end in endings(path.replace(".base_layer", ""))}
    idle = [name for name in case.names("target_modules", len(served) + MOST_NAMES) if name not in served]
    if idle and case.parts and not _is_whole(case, idle):
        said = f"target_modules names {named(idle)}, of which the file has no tensor: PEFT would build them empty, and only warn"
        yield Finding(
            WARNING, "targets", said, "take config and weights from the same save, or take the names out of the config"
        )


def _is_whole(case: Case, idle: list[str]) -> bool:
    """Whether all of these are copied whole or left out by another field."""
    others = [*case.names("modules_to_save"), *case.names("exclude_modules")]
    return len(idle) <= MOST_NAMES and all(
        any(ends_with(name, other) or ends_with(other, name) for other in others) for name in idle
    )


def keys_unnamed(case: Case) -> Iterator[Finding]:
    """Layers with tensors that the config does not name."""
    wanted = case.content.get("target_modules")
    if not isinstance(wanted, list) or case.content.get("target_parameters"):
        return
    rows = isinstance(case.content.get("trainable_token_indices"), (list, dict))
    names, tied = set(case.names("target_modules", len(wanted))), case.content.get("ensure_weight_tying") is True
    paths = {path.replace(".base_layer", "") for path in case.parts}
    odd = sorted(path for path in paths if names.isdisjoint(endings(path)))
    if odd and not (rows or tied):
        said = f"{len(odd)} of {len(paths)} layers are named by no entry of target_modules ({named(odd)}): PEFT leaves their tensors out"
        yield Finding(FAULT, "keys", said, "put their names into target_modules of the config")


def copies(case: Case) -> Iterator[Finding]:
    """``modules_to_save`` without their tensors."""
    owners = [key.removeprefix(PREFIX).rpartition(".")[0] for key in case.seen if part_of(key) is None]
    wanted = case.names("modules_to_save")
    there = {name for name in wanted if any(_within(owner, name) for owner in owners)}
    heads = bool(there & set(_HEADS))  # the other of the two names is no module of this model
    missing = [name for name in wanted if name not in there and not (heads and name in _HEADS)]
    if missing:
        said = f"modules_to_save names {named(missing)}, of which the file has no tensor: they would be as the base has them, or random"
        yield Finding(
            FAULT, "copies", said, "save the adapter again; without gathering, a sharded run leaves copies out"
        )


def _within(owner: str, name: str) -> bool:
    """Whether a tensor's owner is a module whose path ends with this name, or lies in one: so PEFT has it, of half a name too."""
    return bool(name) and f"{name}." in f"{owner}."


def strangers(case: Case) -> Iterator[Finding]:
    """Tensors that no field of the config asks for."""
    wanted, odd = case.names("modules_to_save"), []
    for key in case.seen:
        owner = key.removeprefix(PREFIX).rpartition(".")[0]
        asked = part_of(key) is not None or key in PROJECTIONS or any(_within(owner, name) for name in wanted)
        if not (asked or _is_bias(case, key) or _is_table(case, key) or ".token_adapter." in key):
            odd.append(key)
    magnitudes = [key for key in case.seen if "lora_magnitude_vector" in key and case.content.get("use_dora") is False]
    biases = [key for key in case.seen if key.endswith("lora_B.bias") and not case.content.get("lora_bias")]
    rows = [key for key in case.seen if ".token_adapter." in key and not case.content.get("trainable_token_indices")]
    if found := [*odd, *magnitudes, *biases, *rows]:
        said = f"{len(found)} tensors are asked for by no field of the config, and nobody reads them ({named(found)})"
        yield Finding(
            WARNING, "keys nobody reads", said, "take config and weights from the same save, or leave these tensors out"
        )


def _is_bias(case: Case, key: str) -> bool:
    return key.endswith(".bias") and case.content.get("bias") in ("all", "lora_only")


def _is_table(case: Case, key: str) -> bool:
    """Whether this is an embedding or head that PEFT saves beside an adapter of it, or because the vocabulary was resized."""
    return key.endswith(".weight") and table_of(key).rpartition(".")[2] in EMBEDDINGS


def twins(case: Case) -> Iterator[Finding]:
    """One tensor under two names: a table and the head that is tied to it."""
    digests: dict[str, list[str]] = {}
    for key, seen in case.seen.items():
        if seen.digest and len(seen.shape) == 2 and not seen.zero:
            digests.setdefault(f"{seen.digest} {seen.shape}", []).append(key)
    for keys in digests.values():
        if len(keys) > 1:
            said = f"{named(keys)} are one tensor, saved twice: the head is tied to the embedding"
            yield Finding(
                NOTE, "tied", said, "PEFT and minilora load both; a program that loads one of them alone unties the two"
            )


# ---- which layers


def blocks_of(case: Case) -> dict[str, list[int | None]]:
    """Kind of layer to the numbers of the blocks in which it has an adapter (None outside of blocks), in order."""
    found: dict[str, list[int | None]] = {}
    for layer in case.layers:
        found.setdefault(layer.kind, []).append(_block(layer.path))
    return {kind: sorted(blocks, key=lambda block: -1 if block is None else block) for kind, blocks in found.items()}


def _block(path: str) -> int | None:
    number = re.search(r"\.(\d{1,5})\.", path)
    return int(number[1]) if number else None


def spans(numbers: list[int]) -> str:
    """``0 to 4, 7`` of numbers in order."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    texts = [str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts]
    return ", ".join(texts[:_SHOWN]) + " ..." * (len(texts) > _SHOWN)


def lone(case: Case) -> Iterator[Finding]:
    """Both factors of one layer missing, where that layer of every other block has them."""
    if not (lost := _lone(case)):
        return
    said = f"{named(lost)}: neither A nor B is in the file, and every other block has both: PEFT builds it anew, so that it changes nothing"
    way = "save or copy the adapter again, a part of the file is missing; name the layer in exclude_modules if it was meant to be left out"
    yield Finding(FAULT if case.base is not None else WARNING, "one layer", said, way)


def _lone(case: Case) -> list[str]:
    """Layers that one block alone lacks: the base has them there, or another layer of the same module has an adapter there."""
    excluded = case.content.get("exclude_modules")
    if _some_blocks(case) or isinstance(excluded, str):
        return []
    found: dict[tuple[str, str], set[int]] = {}  # what stands before and after the number of a block -> the blocks
    for layer in case.layers:
        before, number, after = re.match(r"(.*?)\.(\d{1,5})\.(.*)|", layer.path, re.S).groups()  # type: ignore[union-attr]
        if number is not None:
            found.setdefault((before, after), set()).add(int(number))
    every: dict[str, set[int]] = {}
    within: dict[tuple[str, str], set[int]] = {}  # likewise, of the module that holds the layer
    for (before, after), blocks in found.items():
        every.setdefault(before, set()).update(blocks)
        within.setdefault((before, after.rpartition(".")[0]), set()).update(blocks)
    paths = []
    for (before, after), blocks in found.items():
        lost = every[before] - blocks
        path = f"{before}.{min(lost, default=0)}.{after}"
        there = path in case.base.modules if case.base is not None else lost <= within[before, after.rpartition(".")[0]]
        if (
            len(lost) == 1
            and there
            and path not in case.parts
            and not any(ends_with(path, name) for name in case.names("exclude_modules"))
        ):
            paths.append(path)
    return sorted(paths)


def _some_blocks(case: Case) -> bool:
    """Whether the config says that some blocks alone have adapters."""
    return case.content.get("layers_to_transform") is not None or _chosen(case)


def gaps(case: Case) -> Iterator[Finding]:
    """Blocks that lack what their neighbours have."""
    if _some_blocks(case):
        return
    kinds = {kind: {block for block in blocks if block is not None} for kind, blocks in blocks_of(case).items()}
    every = set().union(*kinds.values()) if kinds else set()
    if len(every) < 2:
        return
    way = (
        "name them in layers_to_transform if that was meant; else a part of the file is missing: save or copy it again"
    )
    if holes := sorted(set(range(min(every), max(every))) - every):
        yield Finding(WARNING, "gaps", f"blocks {spans(holes)} have no adapter, and blocks around them have", way)
    said_already = {(path.rpartition(".")[2], _block(path)) for path in _lone(case)}
    for kind, own in kinds.items():
        lost = sorted(
            block for block in every - own if own and (kind, block) not in said_already and _has(case, kind, block)
        )
        if lost and len(own) > 1:
            known = case.base is not None
            said = f"{kind} has no adapter in blocks {spans(lost)}, and has one in {len(own)} others"
            said += "" if known else " (some models have such a layer in some blocks only)"
            yield Finding(WARNING if known else NOTE, "gaps", said, way)


def _chosen(case: Case) -> bool:
    """Whether ``target_modules`` itself names blocks."""
    wanted = case.content.get("target_modules")
    return any(
        re.search(r"\d", name) for name in ([wanted] if isinstance(wanted, str) else case.names("target_modules"))
    )


def _has(case: Case, kind: str, block: int) -> bool:
    """Whether the base has such a layer in a block; taken for granted where the base is not known."""
    if case.base is None:
        return True
    return any(path.endswith(f".{kind}") and _block(path) == block for path in case.base.modules)


CHECKS = (wrong_names, one_factor, ranks, targets_unserved, keys_unnamed, copies, strangers, twins, lone, gaps)

"""Checks of ``adapter_config.json``: fields of other programs, scales that servers read in their own way, ranks, the base's name.

How each program computes a scale stands in ``export/servers.py``, and only there. Next file: ``doctor/base.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from minilora.doctor.case import MOST_NAMES, Case
from minilora.doctor.finding import FAULT, NOTE, WARNING, Finding, named
from minilora.doctor.keys import halves
from minilora.doctor.model import local
from minilora.export.servers import RANKS_OF_VLLM, Server, scaling_read, servers_of, vllm_rank
from minilora.files.validate import PLAIN, shown
from minilora.lora.config import unknown_keys
from minilora.lora.config_file import OUT_OF_SCOPE, PEFT_LAYOUT
from minilora.store.adapter_files import named_patterns

__all__ = ["CHECKS"]

_LARGE = 32.0  # a scaling; in use are 0.5 to 16
_USUAL_RANK = 16  # vLLM's --max-lora-rank unless it is told
_UNSET: tuple[object, ...] = (None, False, "", [], {})
_PACKED = re.compile(r"(?i)^(.+?)(-unsloth)?-(bnb-4bit|bnb-8bit|4bit|8bit|GPTQ.*|AWQ.*)$")
_LOCAL = re.compile(r"^(/|~|\.|[A-Za-z]:[\\/]|\\\\)|\\")


def method(case: Case) -> Iterator[Finding]:
    """A method of PEFT's that is no LoRA."""
    kind = case.content.get("peft_type", "LORA")
    if kind != "LORA" and "peft_type" in case.refusal:
        said = f"peft_type {shown(kind)}: no LoRA, so minilora does not read it, nor do vLLM, llama.cpp or MLX"
        yield Finding(
            WARNING, "method", said, "use it in PEFT, or merge it there (merge_and_unload) and serve the whole model"
        )
    if "peft_type" not in case.content:
        yield Finding(
            FAULT, "method", "the config has no peft_type, and PEFT does not load it without", 'add "peft_type": "LORA"'
        )


def impossible(case: Case) -> Iterator[Finding]:
    """A field that cannot be meant."""
    if case.refusal and "peft_type" not in case.refusal:
        yield Finding(FAULT, "config", case.refusal.rstrip("."), "mend the config, or save the adapter again")


def long_lists(case: Case) -> Iterator[Finding]:
    """Lists that no adapter has, of which the first entries are looked at."""
    for name in ("modules_to_save", "target_parameters", "exclude_modules"):
        value = case.content.get(name)
        if isinstance(value, list) and len(value) > MOST_NAMES:
            said = f"{name} has {len(value):,} entries; the first {MOST_NAMES:,} are looked at"
            yield Finding(FAULT, "config", said, "save the adapter again")


def strange_fields(case: Case) -> Iterator[Finding]:
    """Fields that belong to another version or program, and those of PEFT that minilora leaves out."""
    unknown = unknown_keys(case.content)
    set_ = [name for name in unknown if case.content[name] not in _UNSET]
    quiet = [name for name in unknown if name not in set_]
    way = "PEFT before 0.14 refuses such a config with a TypeError: take the fields out there"
    if set_:
        said = (
            f"{named([f'{name}={shown(case.content[name])[:60]}' for name in set_])}: PEFT {PEFT_LAYOUT} has no such field and ignores it; "
            "if it changes how the update is computed, so does what is served"
        )
        yield Finding(
            WARNING, "unknown fields", said, f"use the program that wrote it, or see what the field means; {way}"
        )
    if quiet:
        yield Finding(NOTE, "unknown fields", f"{named(quiet)}: fields of another version of PEFT, not set", way)
    beyond = [name for name in (*OUT_OF_SCOPE, "layer_replication") if _is_set(case, name)]
    if beyond:
        said = f"{named(beyond)}: a feature of PEFT that minilora does not offer, nor do most servers"
        yield Finding(WARNING, "PEFT alone", said, "use it in PEFT, or merge it there and serve the whole model")


def _is_set(case: Case, name: str) -> bool:
    value = case.content.get(name)
    return value not in _UNSET and value != OUT_OF_SCOPE.get(name)


def expressions(case: Case) -> Iterator[Finding]:
    """Patterns that only PEFT evaluates."""
    if (
        not case.plain
        and not case.refusal
        and any(_has_expressions(case, name) for name in ("rank_pattern", "alpha_pattern"))
    ):
        said = "rank_pattern or alpha_pattern has regular expressions: ranks and scales are not checked, since none is run from a file"
        yield Finding(
            WARNING,
            "expressions",
            said,
            "write names of modules, which mean the same to every program that reads patterns",
        )


def _has_expressions(case: Case, name: str) -> bool:
    """Whether a pattern of the file has more than names of modules in it."""
    value = named_patterns(case.content).get(name)
    return isinstance(value, dict) and not all(map(PLAIN.fullmatch, value))


def large_scale(case: Case) -> Iterator[Finding]:
    """A scaling far above what is in use."""
    if not case.plain:
        return
    most = max(case.layers, key=lambda layer: layer.scaling, default=None)
    if most is not None and most.scaling > _LARGE:
        said = f"{most.path} is scaled by {most.scaling:g}, far above what is usual (0.5 to 16)"
        yield Finding(WARNING, "scale", said, "see lora_alpha: with use_rslora it is divided by the root of r only")


def servers(case: Case) -> Iterator[Finding]:
    """Programs that read the folder otherwise than PEFT, or not at all; those with one reason together."""
    if case.refusal or not case.plain or not case.layers or case.unfit:
        return
    refusing: dict[str, list[str]] = {}
    for server in servers_of(case.stored, case.place.folder):
        if server.takes == "no":
            refusing.setdefault(server.why, []).append(server.name)
        elif server.takes != "as it is" and server.name != "MLX":  # of MLX every folder needs an export
            yield _otherwise(case, server)
    if case.faults or halves(case):  # no program takes it as it is, nor does minilora merge
        return
    for why, names in refusing.items():
        yield Finding(
            WARNING, "servers", f"{', '.join(names[:-1])}{' and ' * (len(names) > 1)}{names[-1]} cannot take it", why
        )


def _otherwise(case: Case, server: Server) -> Finding:
    """A program that wants an export, with the scale that it would compute without; in VeRA's files it finds no LoRA to scale."""
    target, kind = server.name.lower(), case.stored.variant
    if not any(".lora_" in key for key in case.stored.tensors):
        return Finding(
            WARNING, "servers", f"{server.name} finds no LoRA in the folder: its tensors are of {kind}", server.why
        )
    for layer in case.layers:
        read = scaling_read(case.stored, target, layer.r)
        if abs(read - layer.scaling) > 1e-6 * abs(layer.scaling):
            said = f"{server.name} would scale {layer.path} by {read:.4g} where {layer.scaling:.4g} is meant"
            return Finding(WARNING, "servers", said, server.why)
    return Finding(WARNING, "servers", f"{server.name} would read the folder otherwise than it is meant", server.why)


def rank_of_vllm(case: Case) -> Iterator[Finding]:
    """Ranks that vLLM wants to be told of."""
    most = max((layer.r for layer in case.layers if not layer.experts), default=0)
    if _USUAL_RANK < most <= RANKS_OF_VLLM[-1]:  # of larger ones it takes none, which ``servers`` says
        said = f"rank {most}: vLLM takes {_USUAL_RANK} unless it is told"
        yield Finding(NOTE, "rank of vLLM", said, f"start it with --max-lora-rank {vllm_rank(case.stored)}")


# ---- the base's name


def base_name(case: Case) -> Iterator[Finding]:
    """A base that nobody else would find, or another one than is meant."""
    name = case.content.get("base_model_name_or_path")
    if not isinstance(name, str) or not name.strip():
        said = "base_model_name_or_path is empty, so no program knows which model it is for"
        yield Finding(WARNING, "base", said, "write the base's hub id into adapter_config.json")
        return
    if re.search(r"(^|[/\\])checkpoint-\d+[/\\]?$", name):
        said = f"its base is a checkpoint of a run ({name[:200]}): the adapter is right on that model alone"
        yield Finding(WARNING, "base", said, "keep that model with it, or merge both into one")
    elif local(name) is None and (_LOCAL.search(name) or name.count("/") > 1):
        said = f"its base lies on another machine ({name[:200]}), and is not here"
        yield Finding(WARNING, "base", said, "write the base's hub id into adapter_config.json, or give it by --model")
    elif Path(name).is_absolute():
        said = f"its base lies on this machine alone ({name[:200]}): nobody else finds it"
        yield Finding(NOTE, "base", said, "write the base's hub id into adapter_config.json before it is shared")
    elif packed := _PACKED.match(name):
        said = f"its base is packed ({name[:200]}): llama.cpp and others want the dense model that this was made of"
        yield Finding(
            NOTE, "base", said, f"serve it on {packed[1]}, if that is its twin (as its model card should say)"
        )


def revision(case: Case) -> Iterator[Finding]:
    """A base that may change under the adapter."""
    name = case.content.get("base_model_name_or_path")
    known = "minilora.json" in case.place.names  # our seal remembers the base itself
    hub = isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and local(name) != name
    if hub and not known and not case.content.get("revision"):
        said = "the base's revision is not pinned, so its author may change it under the adapter"
        yield Finding(NOTE, "revision", said, "write the commit of the base into revision of adapter_config.json")


CHECKS = (
    method,
    impossible,
    long_lists,
    strange_fields,
    expressions,
    large_scale,
    servers,
    rank_of_vllm,
    base_name,
    revision,
)

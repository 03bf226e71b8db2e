"""Which programs take an adapter folder as it is, which after ``export``, and which not at all, with the reason.

A program that reads PEFT's layout computes the scaling of a layer in its own way: PEFT from every field of the config; vLLM from ``r``,
``lora_alpha`` and ``use_rslora`` without the patterns; llama.cpp's converter from ``lora_alpha`` and the rank of each tensor. Next file:
``export/programs.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from minilora.export.factors import GGUF
from minilora.export.folders import is_of_a_pipeline, refusal
from minilora.export.programs import RANKS_OF_VLLM, TARGETS, max_lora_rank
from minilora.export.stored import way_out
from minilora.lora.adapter import variant
from minilora.store.adapter_files import Stored
from minilora.store.contents import by_factors

__all__ = ["RANKS_OF_VLLM", "Server", "scaling_read", "servers_of", "vllm_rank"]

_CALLED = {"vllm": "vLLM", "llama.cpp": "llama.cpp", "mlx": "MLX", "diffusers": "diffusers"}


@dataclass(frozen=True)
class Server:
    """What one program makes of an adapter: ``takes`` is "as it is", "after export" or "no"; ``why`` is the reason, or how."""

    name: str
    takes: str
    why: str


def servers_of(stored: Stored, folder: Path) -> list[Server]:
    """PEFT and every program that ``export`` knows; ``folder`` is where the adapter lies, for the commands that are named."""
    targets = [target for target in TARGETS if target != "diffusers" or is_of_a_pipeline(stored)]
    return [_peft(stored), *(_server(stored, target, folder) for target in targets)]


def _peft(stored: Stored) -> Server:
    if stored.config.target_parameters and (stored.variant != "lora" or stored.config.lora_dropout):
        what = "lora_dropout" if stored.variant == "lora" else stored.variant
        return Server(
            "PEFT", "no", f"it refuses {what} on experts and routers; minilora merge makes a whole model of it"
        )
    if stored.config.target_parameters and (lost := _taken_for_experts(stored)):
        return Server(
            "PEFT",
            "no",
            f"PEFT 0.21 takes {lost} in target_modules for experts; minilora merge makes a whole model of it",
        )
    if stored.variant == stored.config.variant or by_factors(variant(stored.variant)):
        return Server("PEFT", "as it is", "the folder is in its layout")
    return Server("PEFT", "no", f"its config has no word for {stored.variant}")


def _taken_for_experts(stored: Stored) -> str:
    """A name in ``target_modules`` that PEFT reads as one of experts, on models that have such beside dense layers; "" for none."""
    names, targets = ("gate_proj", "up_proj", "down_proj"), stored.config.target_modules
    return next((name for name in names if not isinstance(targets, str) and name in (targets or ())), "")


def _server(stored: Stored, target: str, folder: Path) -> Server:
    name, base = _CALLED[target], stored.config.base_model_name_or_path or "BASE"
    export = f"minilora export --adapter {folder} --for {target} --out NEW"
    why, with_base = refusal(stored, target)
    if why is not None:
        reason = why.partition(";")[0]
        if target == "llama.cpp" and refusal(stored, GGUF)[0] is None:
            return Server(
                name, "after export", f"{export.replace('NEW', 'NEW.gguf')} --base SERVED.gguf: as a folder, {reason}"
            )
        if with_base:
            return Server(name, "after export", f"{export} --model {base}: {reason}")
        return Server(name, "no", f"{reason}; {way_out(stored)}")
    if reason := _misread(stored, target):
        return Server(name, "after export", f"{export}: {reason}")
    if target == "llama.cpp":
        directly = f"{export.replace('NEW', 'NEW.gguf')} --base SERVED.gguf writes a GGUF LoRA without it"
        return Server(name, "as it is", f"its convert_lora_to_gguf.py reads the folder; {directly}")
    start = f"vllm serve {base} --enable-lora --max-lora-rank {vllm_rank(stored)} --lora-modules mine={folder}"
    return Server(name, "as it is", start)


def _misread(stored: Stored, target: str) -> str:
    """What the program would get wrong in the folder as it is; "" for nothing."""
    config = stored.config
    if target in ("mlx", "diffusers"):
        return "it has a layout of its own"
    if target == "vllm":
        return "it passes over rank and alpha patterns" if config.rank_pattern or config.alpha_pattern else ""
    return "its converter takes lora_alpha / r for every layer" if config.use_rslora or config.alpha_pattern else ""


def scaling_read(stored: Stored, target: str, rank: int) -> float:
    """The scaling that the program takes for a layer of this ``rank`` in the folder as it is; right is ``config.scaling(path)``."""
    config = stored.config
    if target == "llama.cpp":
        return config.lora_alpha / rank
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def vllm_rank(stored: Stored) -> int:
    """What vLLM's ``--max-lora-rank`` has to be: the first rank that it allows from the adapter's largest on; that one where none is."""
    return max_lora_rank(_rank(stored)) or _rank(stored)


def _rank(stored: Stored) -> int:
    """The largest rank in the folder."""
    return max((len(t) for key, t in stored.tensors.items() if key.endswith("lora_A.weight")), default=1)

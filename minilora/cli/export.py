"""``minilora export``: an adapter for another program."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from minilora.cli.adapters import add_adapter_flags, trust_of
from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.folders import new_folder
from minilora.cli.parser import one_of
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.remembered import tell_system
from minilora.cli.say import say
from minilora.export.programs import COMPONENTS, TARGETS, vllm_rank_hint
from minilora.job.settings import Job

USAGE = "--adapter FOLDER --for PROGRAM --out FOLDER [options]"
EXAMPLES = """\
  minilora export --adapter runs/mine --for vllm --out runs/for-vllm
  minilora export --adapter runs/olora --for llama.cpp --out runs/for-llama --model smollm2"""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora export`` takes."""
    add_plugin_flag(parser)
    base = (
        'the adapter\'s base model: hub id, local folder, or "smollm2"; needed for variants other than LoRA and rsLoRA'
    )
    model = Flag("model", str, None, base, otherwise="as the run of --adapter was trained")
    trust = fields_of(Job, ("trust_remote_code",)).values()
    add_flags(parser, "model", [model, *trust])
    add_adapter_flags(parser, required=True)
    program = Flag("target", str, None, "who will read it", TARGETS, True, "--for", one_of(TARGETS))
    about = "for diffusers: the part of the pipeline that the model is"
    found = "found by the class of the model"
    part = Flag("component", str, None, about, COMPONENTS, check=one_of(COMPONENTS), otherwise=found)
    add_flags(parser, "output", [program, new_folder("exported adapter"), part])


def run(arguments: argparse.Namespace) -> None:
    """Write it, and say with which rank."""
    from minilora.export.folders import export_adapter, export_folder
    from minilora.hf.folders import refuse_occupied
    from minilora.job.record import read_record

    refuse_occupied(arguments.out)
    options = _base(arguments)
    if options:
        from minilora import PeftModel
        from minilora.hf import load_model
        from minilora.training.progress import Progress, busy

        with Progress(0, sys.stderr), busy(f"loading {options['name']}"):
            base = load_model(**options, trust_remote_code=arguments.trust_remote_code)
        model = PeftModel.from_pretrained(base, arguments.adapter, **trust_of(arguments))
        rank = export_adapter(model, arguments.out, arguments.target, component=arguments.component)
    else:
        rank = export_folder(
            arguments.adapter, arguments.out, arguments.target, arguments.expect_sha256, arguments.component
        )
    record = read_record(arguments.adapter)
    hint = f"; {vllm_rank_hint(rank)}" if arguments.target == "vllm" else ""
    say(f"{arguments.out}: adapter for {arguments.target}, rank {rank}, scale 1{hint}")
    if record is not None:
        tell_system(record)


def _base(arguments: argparse.Namespace) -> dict[str, Any]:
    """How ``load_model`` loads the base, where one is needed: as the run had it, and dense where no run remembers. {} without.

    What the adapter is hangs on its base, packed or not, so a model that is named is packed as the run's was.
    """
    from minilora.job.record import read_record
    from minilora.store.adapter_files import read_adapter

    record = read_record(arguments.adapter)
    if not arguments.model and (record is None or read_adapter(arguments.adapter).variant == "lora"):
        return {}
    if record is None:
        return {"name": arguments.model}
    import torch

    from minilora.job.in_hand import to_pack

    name = arguments.model or record.model
    say(f"the base: {name}, {record.packing}, in {record.dtype}, as the run of {arguments.adapter} had it", error=True)
    return {"name": name, "dtype": getattr(torch, record.dtype), "quant": to_pack(record.packing)}

"""``minilora export``: an adapter for another program."""

from __future__ import annotations

import argparse

from minilora.cli.adapters import add_adapter_flags, trust_of
from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.folders import new_folder
from minilora.cli.parser import one_of
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.say import say
from minilora.job.settings import Job
from minilora.store.programs import TARGETS

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
    trust = fields_of(Job, ("trust_remote_code",)).values()
    add_flags(parser, "model", [Flag("model", str, None, base), *trust])
    add_adapter_flags(parser, required=True)
    program = Flag("target", str, None, "who will read it", TARGETS, True, "--for", one_of(TARGETS))
    add_flags(parser, "output", [program, new_folder("exported adapter")])


def run(arguments: argparse.Namespace) -> None:
    """Write it, and say with which rank."""
    from minilora.hf.folders import refuse_occupied
    from minilora.store.export import export_adapter, export_folder

    refuse_occupied(arguments.out)
    if arguments.model:
        from minilora import PeftModel
        from minilora.hf import load_model

        base = load_model(arguments.model, trust_remote_code=arguments.trust_remote_code)
        model = PeftModel.from_pretrained(base, arguments.adapter, **trust_of(arguments))
        rank = export_adapter(model, arguments.out, arguments.target)
    else:
        rank = export_folder(arguments.adapter, arguments.out, arguments.target, arguments.expect_sha256)
    hint = f"; start vLLM with --max-lora-rank {rank} or more" if arguments.target == "vllm" else ""
    say(f"{arguments.out}: adapter for {arguments.target}, rank {rank}, scale 1{hint}")

"""``minilora merge``: an adapter folded into its model, saved as an ordinary transformers folder."""

from __future__ import annotations

import argparse
import dataclasses

from minilora.cli.adapters import add_adapter_flags, trust_of
from minilora.cli.flags import add_flags, fields_of
from minilora.cli.folders import DTYPE, check_dtype, new_folder
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.say import say
from minilora.job.settings import Job

USAGE = "--model NAME --adapter FOLDER --out FOLDER [options]"
EXAMPLES = """\
  minilora merge --model smollm2 --adapter runs/mine --out runs/merged
  minilora merge --model ./llama --adapter runs/mine --out runs/merged --dtype bfloat16"""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora merge`` takes."""
    add_plugin_flag(parser)
    add_flags(parser, "model", fields_of(Job, ("model", "device", "trust_remote_code"), device="cpu").values())
    add_adapter_flags(parser, required=True)
    merged = dataclasses.replace(DTYPE, about="number format of the merged weights")
    add_flags(parser, "output", [new_folder("merged model"), merged])


def run(arguments: argparse.Namespace) -> None:
    """Merge in fp32, save, and say how much of the update survived."""
    check_dtype(arguments)
    from minilora.hf.devices import choose
    from minilora.hf.merge import merge_to_folder

    place = choose(arguments.device, arguments.dtype)
    options = {
        "dtype": place.dtype,
        "device": place.device,
        "trust_remote_code": arguments.trust_remote_code,
        **trust_of(arguments),
    }
    folder = merge_to_folder(arguments.model, arguments.adapter, arguments.out, **options)
    say(f"merged model in {folder}, merged on {place.said}")

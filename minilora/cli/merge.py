"""``minilora merge``: an adapter folded into its model, saved as an ordinary transformers folder."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from minilora.cli.adapters import add_adapter_flags, trust_of
from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.folders import DTYPE, check_dtype, new_folder, refuse_file
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.remembered import BASE, as_trained, recall, tell_differences, tell_system
from minilora.cli.say import say
from minilora.errors import ConfigError
from minilora.gguf.words import WEIGHTS as KINDS
from minilora.job.settings import Job

if TYPE_CHECKING:
    from minilora.job.record import Record

USAGE = "--adapter FOLDER --out PATH [--model NAME] [options]"
EXAMPLES = """\
  minilora merge --adapter runs/mine --out runs/merged
  minilora merge --adapter runs/mine --out mine.gguf --gguf q8_0
  minilora merge --model ./llama --adapter runs/mine --out runs/merged --dtype bfloat16"""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora merge`` takes."""
    add_plugin_flag(parser)
    model = fields_of(Job, ("model", "device", "trust_remote_code"), device="cpu") | {"model": BASE}
    add_flags(parser, "model", model.values())
    add_adapter_flags(parser, required=True)
    merged = dataclasses.replace(DTYPE, about="number format of the merged weights")
    file = Flag("gguf", str, None, "write one GGUF file for llama.cpp instead, with weights of this kind", KINDS)
    out = new_folder("merged model")
    out = dataclasses.replace(out, about=f"{out.about}; with --gguf, the new file", stands="PATH")
    add_flags(parser, "output", [out, as_trained(merged, DTYPE.default), file])


def run(arguments: argparse.Namespace) -> None:
    """Merge in fp32, save, and say how much of the update survived, and what the answers of its run were measured on."""
    if arguments.gguf is not None:  # all of this before anything is read
        _check_file(arguments)
    elif arguments.dtype is not None:
        check_dtype(arguments)
    record = recall(arguments, dtype=DTYPE.default)
    from minilora.hf.devices import choose
    from minilora.hf.merge import merge_to_folder, merge_to_gguf
    from minilora.training.progress import Progress

    place = choose(arguments.device, arguments.dtype)
    options: dict[str, Any] = {
        "device": place.device,
        "trust_remote_code": arguments.trust_remote_code,
        **trust_of(arguments),
    }
    if record is not None:
        options["look"] = lambda model, tokenizer: _look(arguments, record, model, tokenizer)
    with Progress(0, sys.stderr):
        what = (arguments.model, arguments.adapter, arguments.out)
        if arguments.gguf is None:
            made = merge_to_folder(*what, dtype=place.dtype, **options)
        else:
            made = merge_to_gguf(*what, kind=arguments.gguf, **options)
    say(f"merged model in {made}, merged on {place.said}")
    if record is not None:
        say(_measured(arguments, record))
        tell_system(record)


def _check_file(arguments: argparse.Namespace) -> None:
    """``--gguf`` and what goes with it."""
    if arguments.gguf not in KINDS:
        raise ConfigError(f"--gguf={arguments.gguf!r}: wanted one of {', '.join(KINDS)}")
    if arguments.dtype is not None:
        raise ConfigError(
            f"--dtype={arguments.dtype!r}: --gguf {arguments.gguf} says what the weights are; leave one out"
        )
    refuse_file(arguments.out)
    arguments.dtype = "float32"


def _look(arguments: argparse.Namespace, record: Record, model: Any, tokenizer: Any) -> None:
    from minilora.job.in_hand import differences
    from minilora.job.record import Packing
    from minilora.job.sessions import template_sha256

    packing = record.packing if record.packing.by_folder else Packing("none")
    dense = dataclasses.replace(record, packing=packing, dtype=arguments.dtype)
    tell_differences(arguments.adapter, differences(dense, model, template_sha256(tokenizer), arguments.dtype))


def _measured(arguments: argparse.Namespace, record: Record) -> str:
    """What base the answers in the report of the run are those of, and whether that is what they were merged into."""
    packed = record.packing.quant != "none" and not record.packing.by_folder
    merged = f"{'the dense ' * packed}{arguments.model} in {arguments.dtype}"
    base = f"{record.model}, {record.packing}, in {record.dtype}"
    apart = packed or record.dtype != arguments.dtype or record.model != arguments.model
    rest = f"; this is merged into {merged}, whose answers can be others: ask it before you rely on it" if apart else ""
    return f"the answers in the report of {arguments.adapter} were measured on {base}, with the adapter beside it{rest}"

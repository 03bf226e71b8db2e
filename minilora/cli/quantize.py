"""``minilora quantize``: a model packed into few bits, as a folder; of nf4 and fp4 one that bitsandbytes' users can open too."""

from __future__ import annotations

import argparse

from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.folders import DTYPE, check_dtype, new_folder
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.say import say
from minilora.job.settings import Job
from minilora.quant.codebooks import CODEBOOKS
from minilora.quant.config import QuantConfig

USAGE = "--model NAME --out FOLDER [options]"
EXAMPLES = """\
  minilora quantize --model smollm2 --out runs/packed
  minilora quantize --model smollm2 --out runs/small --format nf3
  minilora quantize --model smollm2 --out runs/packed --scale weighted --calibration chats.jsonl"""

_PACKING = ("blocksize", "double_quant", "scale", "signed_scale")


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora quantize`` takes."""
    add_plugin_flag(parser)
    about = (
        "values that a packed weight can have; bitsandbytes opens nf4 and fp4 with a blocksize from 64, minilora all"
    )
    format = Flag("format", str, "nf4", about, tuple(CODEBOOKS))
    packing = fields_of(QuantConfig, _PACKING, double_quant=True)
    own = fields_of(Job, ("model", "device", "trust_remote_code"))
    add_flags(parser, "model", [own.pop("model"), format, *packing.values(), DTYPE, *own.values()])
    text = "JSONL file, as for minilora train, of text like what the model will read; needed by --scale weighted"
    add_flags(parser, "data", [Flag("calibration", str, None, text)])
    add_flags(parser, "output", [new_folder("packed model")])


def run(arguments: argparse.Namespace) -> None:
    """Pack, save, and say how large it is."""
    check_dtype(arguments)
    config = QuantConfig(arguments.format, **{name: getattr(arguments, name) for name in _PACKING})
    from minilora.hf.devices import choose
    from minilora.hf.quantize import quantize_to_folder

    place = choose(arguments.device, arguments.dtype)
    options = {"dtype": place.dtype, "device": place.device, "trust_remote_code": arguments.trust_remote_code}
    kept = quantize_to_folder(arguments.model, arguments.out, config, arguments.calibration, **options)
    say(
        f"packed model in {arguments.out}: {kept / 1e6:.0f} MB, packed on {place.said}; use it as --model {arguments.out}"
    )

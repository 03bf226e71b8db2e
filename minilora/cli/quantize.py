"""``minilora quantize``: a model packed into 4 bits, as a folder that bitsandbytes' users can open too."""

from __future__ import annotations

import argparse
import dataclasses

from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.folders import DTYPE, check_dtype, new_folder
from minilora.cli.say import say
from minilora.errors import ConfigError
from minilora.job.settings import Job
from minilora.quant.codebooks import ON_DISK
from minilora.quant.config import QuantConfig

USAGE = "--model NAME --out FOLDER [options]"
EXAMPLES = """\
  minilora quantize --model smollm2 --out runs/packed
  minilora quantize --model smollm2 --out runs/packed --scale weighted --calibration chats.jsonl"""

_PACKING = ("blocksize", "double_quant", "scale", "signed_scale")


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora quantize`` takes."""
    format = Flag("format", str, "nf4", "the 16 values that a packed weight can have", ON_DISK)
    packing = fields_of(QuantConfig, _PACKING, double_quant=True)
    size = "weights that share one scale; a power of two from 64 to 4096"  # files hold no smaller one
    packing["blocksize"] = dataclasses.replace(packing["blocksize"], about=size)
    own = fields_of(Job, ("model", "device", "trust_remote_code"))
    add_flags(parser, "model", [own.pop("model"), format, *packing.values(), DTYPE, *own.values()])
    text = "JSONL file, as for minilora train, of text like what the model will read; needed by --scale weighted"
    add_flags(parser, "data", [Flag("calibration", str, None, text)])
    add_flags(parser, "output", [new_folder("packed model")])


def run(arguments: argparse.Namespace) -> None:
    """Pack, save, and say how large it is."""
    check_dtype(arguments)
    if arguments.format not in ON_DISK:
        raise ConfigError(
            f"--format={arguments.format!r}: wanted {' or '.join(ON_DISK)}, which bitsandbytes' files hold; others live in memory only"
        )
    config = QuantConfig(arguments.format, **{name: getattr(arguments, name) for name in _PACKING})
    from minilora.hf.devices import choose
    from minilora.hf.quantize import quantize_to_folder

    place = choose(arguments.device, arguments.dtype)
    options = {"dtype": place.dtype, "device": place.device, "trust_remote_code": arguments.trust_remote_code}
    kept = quantize_to_folder(arguments.model, arguments.out, config, arguments.calibration, **options)
    say(
        f"packed model in {arguments.out}: {kept / 1e6:.0f} MB, packed on {place.said}; use it as --model {arguments.out}"
    )

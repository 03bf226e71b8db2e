"""``minilora export``: an adapter for another program."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from minilora.cli.adapters import add_adapter_flags, trust_of
from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.folders import new_folder, refuse_file
from minilora.cli.parser import one_of
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.remembered import tell_system
from minilora.cli.say import say
from minilora.errors import ConfigError
from minilora.export.programs import COMPONENTS, PROGRAMS, WITH_BASE, vllm_rank_hint
from minilora.gguf.words import FACTORS
from minilora.job.settings import Job

if TYPE_CHECKING:
    from minilora.job.record import Record

USAGE = "--adapter FOLDER --for PROGRAM --out PATH [options]"
EXAMPLES = """\
  minilora export --adapter runs/mine --for vllm --out runs/for-vllm
  minilora export --adapter runs/mine --for llama.cpp --base served.gguf --out mine.gguf
  minilora export --adapter runs/mine --for ollama --base served.gguf --out runs/for-ollama
  minilora export --adapter runs/olora --for vllm --out runs/for-vllm --model smollm2"""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora export`` takes."""
    add_plugin_flag(parser)
    base = 'the adapter\'s base model: hub id, local folder, GGUF file, or "smollm2"; needed for variants that hang on it, such as PiSSA'
    model = Flag("model", str, None, base, otherwise="as the run of --adapter was trained")
    trust = fields_of(Job, ("trust_remote_code",)).values()
    add_flags(parser, "model", [model, *trust])
    add_adapter_flags(parser, required=True)
    program = Flag("target", str, None, "who will read it", PROGRAMS, True, "--for", one_of(PROGRAMS))
    served = "the GGUF file that llama.cpp or Ollama serves: a GGUF LoRA for it is written, and no converter is needed"
    base_file = Flag("base", str, None, f'{served}; "smollm2.gguf" is that of the demo\'s model')
    dtype = Flag("dtype", str, "f32", "number format of a GGUF LoRA", FACTORS)
    out = dataclasses.replace(
        new_folder("exported adapter"),
        about="folder for the exported adapter, which must not exist yet or be empty; for llama.cpp with --base, the new GGUF file",
        stands="PATH",
    )
    about = "for diffusers: the part of the pipeline that the model is, where its class does not say so"
    part = Flag("component", str, None, about, COMPONENTS, check=one_of(COMPONENTS))
    add_flags(parser, "output", [program, base_file, dtype, part, out])


def run(arguments: argparse.Namespace) -> None:
    """Write it, and say with which rank."""
    from minilora.job.record import read_record

    _check(arguments)
    record = read_record(arguments.adapter)
    if arguments.base:
        from minilora.hf.load import served_file

        arguments.base = served_file(arguments.base)
        _write_gguf(arguments, record)
    else:
        _write_folder(arguments)
    if record is not None and arguments.target != "ollama":
        tell_system(record)


def _check(arguments: argparse.Namespace) -> None:
    """What does not go together, before anything is read."""
    from minilora.hf.folders import refuse_occupied

    target, base = arguments.target, arguments.base
    if target == "ollama" and not base:
        raise ConfigError(
            "--for ollama: --base is missing; wanted the GGUF file of the model that the adapter is laid beside"
        )
    if base and target not in WITH_BASE:
        raise ConfigError(f"--base={base!r}: is for llama.cpp and ollama; --for {target} has no use for a GGUF file")
    if arguments.dtype != "f32" and not base:
        raise ConfigError(
            f"--dtype={arguments.dtype!r}: is for a GGUF LoRA; give --base SERVED.gguf too, or leave it out"
        )
    if arguments.dtype not in FACTORS:
        raise ConfigError(f"--dtype={arguments.dtype!r}: wanted one of {', '.join(FACTORS)}")
    if base and target == "llama.cpp":
        refuse_file(arguments.out)
    else:
        refuse_occupied(arguments.out)


def _write_folder(arguments: argparse.Namespace) -> None:
    from minilora.export.folders import export_adapter, export_folder

    model = adapted(arguments)
    if model is not None:
        rank = export_adapter(model, arguments.out, arguments.target, component=arguments.component)
    else:
        rank = export_folder(
            arguments.adapter, arguments.out, arguments.target, arguments.expect_sha256, arguments.component
        )
    hint = f"; {vllm_rank_hint(rank)}" if arguments.target == "vllm" else ""
    say(f"{arguments.out}: adapter for {arguments.target}, rank {rank}, scale 1{hint}")


def _write_gguf(arguments: argparse.Namespace, record: Record | None) -> None:
    from minilora.export.llama_cpp import export_gguf
    from minilora.export.ollama import export_ollama
    from minilora.hf.jinja import write_chat

    model = adapted(arguments)
    adapter = arguments.adapter if model is None else model
    options = {"dtype": arguments.dtype, **trust_of(arguments)}
    if arguments.target == "ollama":
        system = "" if record is None else record.system
        for line in export_ollama(adapter, arguments.base, arguments.out, write_chat, system=system, **options):
            say(line)
        return
    ranks = export_gguf(adapter, arguments.base, arguments.out, **options)
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    say(f"{arguments.out}: GGUF LoRA in {options['dtype']}, {shown}, scale 1")
    say(f"llama-server -m {arguments.base} --lora {arguments.out}")


def adapted(arguments: argparse.Namespace) -> Any:
    """The base with the adapter on it, where the adapter is not all in its folder; else None.

    Asks ``arguments`` for adapter, model, target, base, component, trust_remote_code, expect_sha256 and allow_other_base.
    """
    options = _base(arguments)
    if not options:
        return None
    from minilora import PeftModel
    from minilora.hf import load_model
    from minilora.training.progress import Progress, busy

    with Progress(0, sys.stderr), busy(f"loading {options['name']}"):
        base = load_model(**options, trust_remote_code=arguments.trust_remote_code)
    return PeftModel.from_pretrained(base, arguments.adapter, **trust_of(arguments))


def _base(arguments: argparse.Namespace) -> dict[str, Any]:
    """How ``load_model`` loads the base, where one is needed: as the run had it, and dense where no run remembers. {} without.

    What the adapter is hangs on its base, packed or not, so a model that is named is packed as the run's was.
    """
    from minilora.job.record import read_record

    record = read_record(arguments.adapter)
    if not arguments.model and (record is None or not _hangs_on_it(arguments)):
        return {}
    if record is None:
        return {"name": arguments.model}
    import torch

    from minilora.job.in_hand import to_pack

    name = arguments.model or record.model
    say(f"the base: {name}, {record.packing}, in {record.dtype}, as the run of {arguments.adapter} had it", error=True)
    return {"name": name, "dtype": getattr(torch, record.dtype), "quant": to_pack(record.packing)}


def _hangs_on_it(arguments: argparse.Namespace) -> bool:
    """Whether the folder alone does not say the adapter to this program, and its base does."""
    from minilora.export.factors import GGUF
    from minilora.export.folders import refusal
    from minilora.store.adapter_files import read_adapter

    stored = read_adapter(arguments.adapter, expect_sha256=arguments.expect_sha256)
    return refusal(stored, GGUF if arguments.base else arguments.target, arguments.component)[1]

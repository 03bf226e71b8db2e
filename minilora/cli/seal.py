"""``minilora seal``: keep in an adapter folder what its base and the adapted model say to a few prompts (``probe.json``)."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from minilora.cli.adapters import add_adapter_flags
from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.generate import check_words, loaded
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.program import command
from minilora.cli.remembered import BASE, as_trained, recall
from minilora.cli.say import say
from minilora.files import validate
from minilora.hf.places import AUTO, DTYPE_CHOICES, QUANT_CHOICES
from minilora.job.settings import Job

USAGE = "FOLDER [--model NAME] [--prompts TEXT ...] [options]"
EXAMPLES = """\
  minilora seal runs/mine
  minilora seal ./peft-adapter --model smollm2 --prompts "How is the weather?" "Who are you?\""""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora seal`` takes."""
    add_plugin_flag(parser)
    parser.add_argument("folder", help="adapter folder (ours or PEFT's), which gets probe.json (required)")
    model = fields_of(Job, ("model", "quant", "double_quant", "device", "dtype", "attention", "trust_remote_code"))
    model["model"] = BASE
    for name, words in (("quant", QUANT_CHOICES), ("dtype", DTYPE_CHOICES)):
        model[name] = dataclasses.replace(model[name], choices=words)
    for name, otherwise in (("quant", "none"), ("dtype", AUTO), ("attention", AUTO)):
        model[name] = as_trained(model[name], otherwise)
    add_flags(parser, "model", map(_of_folder, model.values()))
    add_adapter_flags(parser, required=False, named=False)
    about = "texts to ask, at whose answers base and adapted model differ"
    prompts = Flag("prompts", list, [], about, otherwise="as the run of --adapter was asked")
    system = as_trained(Flag("system", str, None, 'a system turn that is put before each prompt; "" puts none'), "none")
    add_flags(parser, "generation", map(_of_folder, [prompts, system]))


def _of_folder(flag: Flag) -> Flag:
    """The flag of a command whose adapter is its folder."""
    return dataclasses.replace(flag, otherwise=flag.otherwise.replace("--adapter", "FOLDER"))


def run(arguments: argparse.Namespace) -> None:
    """Load, ask, write; say how well a server can be verified by it."""
    from minilora.proof.probe import digest_of

    validate.texts("--prompts", arguments.prompts)
    arguments.adapter = arguments.folder
    arguments.seed, arguments.temperature = 0, 0.0
    check_words(arguments)
    digest_of(arguments.folder)
    if arguments.model is None:
        arguments.model = _named(arguments.folder)
        arguments.named_by = arguments.folder
    record = recall(arguments, dtype=AUTO, attention=AUTO, system="")
    from minilora.job.sessions import packing_of, template_sha256
    from minilora.proof.measured import seal_folder
    from minilora.training.progress import Progress

    with Progress(0, sys.stderr):
        model, tokenizer, _ = loaded(arguments, record)
        prompts = arguments.prompts or (record.prompts if record else [])
        template = record.template if record else template_sha256(tokenizer)
        about = {
            "system": arguments.system,
            "template": template,
            "packing": str(packing_of(model)),
            "name": arguments.model,
        }
        seal_folder(
            model, tokenizer, arguments.folder, prompts, say=lambda line: say(f"{arguments.folder}: {line}"), **about
        )
    say(f"next: {command('verify', arguments.folder, '--server', 'http://127.0.0.1:8080')}")


def _named(folder: str) -> str | None:
    """The base that an adapter of another program names; what a run remembers is asked for elsewhere."""
    from minilora.job.record import read_record
    from minilora.store.adapter_files import read_config

    return None if read_record(folder) else read_config(folder).base_model_name_or_path

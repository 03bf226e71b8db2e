"""``minilora seal``: keep in an adapter folder what its base and the adapted model say to a few prompts (``probe.json``)."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from minilora.cli.adapters import add_adapter_flags
from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.generate import check, check_words, loaded
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
    model["model"] = Flag(
        "model",
        str,
        None,
        BASE.about,
        otherwise="as the run in the folder was trained, else the base that the adapter names",
    )
    for name, words in (("quant", QUANT_CHOICES), ("dtype", DTYPE_CHOICES)):
        model[name] = dataclasses.replace(model[name], choices=words)
    for name, otherwise in (("quant", "none"), ("dtype", AUTO), ("attention", AUTO)):
        model[name] = as_trained(model[name], otherwise)
    add_flags(parser, "model", model.values())
    add_adapter_flags(parser, required=False)
    prompts = Flag(
        "prompts",
        list,
        [],
        "texts to ask, at which base and adapter differ",
        otherwise="those of the run, and general ones",
    )
    system = Flag("system", str, None, 'a system turn that is put before each prompt; "" puts none')
    add_flags(parser, "probe", [prompts, as_trained(system, "none")])


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
    record = recall(arguments, dtype=AUTO, attention=AUTO, system="", max_new_tokens=1)
    check(arguments)
    from minilora.job.sessions import packing_of, template_sha256
    from minilora.proof.measure import seal_folder
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

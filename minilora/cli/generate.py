"""``minilora generate``: ask a model, with or without an adapter."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from minilora.cli.adapters import add_adapter_flags, trust_of
from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.say import say
from minilora.errors import ConfigError
from minilora.files import validate
from minilora.hf.places import DTYPE_CHOICES, QUANT_CHOICES, check_place, check_quant, packing
from minilora.job.settings import Job

USAGE = "--model NAME [--adapter FOLDER] [options] PROMPT [PROMPT ...]"
EXAMPLES = """\
  minilora generate --model smollm2 "How is the weather?"
  minilora generate --model smollm2 --adapter runs/mine --quant nf4 --temperature 0.7 "How is the weather?" "Who are you?\""""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora generate`` takes."""
    add_plugin_flag(parser)
    model = fields_of(Job, ("model", "quant", "device", "dtype", "attention", "trust_remote_code"), quant="none")
    for name, words in (("quant", QUANT_CHOICES), ("dtype", DTYPE_CHOICES)):
        model[name] = dataclasses.replace(model[name], choices=words)
    add_flags(parser, "model", model.values())
    add_adapter_flags(parser, required=False)
    heat = "of drawn tokens, a number >= 0: 0 takes the likeliest token, 1 draws by the model's own odds"
    asked = [
        Flag("max_new_tokens", int, 128, "tokens that an answer may have"),
        Flag("temperature", float, 0.0, heat),
        Flag("seed", int, 0, "whole number >= 0 that drawn tokens follow from"),
    ]
    add_flags(parser, "generation", asked)
    parser.add_argument("prompt", nargs="+", help="what the model is asked; each prompt in quotes (required)")


def run(arguments: argparse.Namespace) -> None:
    """Load, ask, print; with several prompts each stands above its answer."""
    _check(arguments)
    import torch

    from minilora import PeftModel
    from minilora.hf import answers, load_model, load_tokenizer
    from minilora.hf.devices import choose

    place = choose(arguments.device, arguments.dtype, arguments.attention)
    trust, quant = arguments.trust_remote_code, packing(arguments.quant, True)
    tokenizer = load_tokenizer(arguments.model, trust)
    options = {"device": place.device, "quant": quant, "attention": arguments.attention}
    model = load_model(arguments.model, place.dtype, trust, **options)
    if arguments.adapter:
        model = PeftModel.from_pretrained(model, arguments.adapter, **trust_of(arguments))
    if sys.stderr.isatty():  # for a person who waits; what is piped on is the answer alone
        say(f"{arguments.model} on {place.said}", error=True)
    torch.manual_seed(arguments.seed)
    for prompt in arguments.prompt:
        said = answers(model, tokenizer, [prompt], arguments.max_new_tokens, arguments.temperature)[0]
        say(f"> {prompt}\n{said}\n" if len(arguments.prompt) > 1 else said)


def _check(arguments: argparse.Namespace) -> None:
    check_quant(arguments.quant)
    check_place(arguments.device, arguments.dtype, arguments.attention)
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={arguments.max_new_tokens}: wanted a whole number >= 1")
    validate.whole("--seed", arguments.seed, 0, 2**63 - 1)
    if not 0 <= arguments.temperature < float("inf"):
        raise ConfigError(f"--temperature={arguments.temperature}: wanted a number >= 0; 0 is greedy")

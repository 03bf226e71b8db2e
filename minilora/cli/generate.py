"""``minilora generate``: ask a model, with or without an adapter; of a run, as the run was asked."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from minilora.cli.adapters import add_adapter_flags, trust_of
from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.remembered import BASE, as_trained, recall, tell_differences
from minilora.cli.say import say
from minilora.errors import CheckpointError, ConfigError
from minilora.files import validate
from minilora.hf.places import AUTO, DTYPE_CHOICES, QUANT_CHOICES, check_place, check_quant, packing
from minilora.job.settings import Job

if TYPE_CHECKING:
    from minilora.hf.devices import Place
    from minilora.job.record import Record

_LENGTH = 128  # tokens of an answer, where no run says how many

USAGE = "[--model NAME] [--adapter FOLDER] [options] [PROMPT ...]"
EXAMPLES = """\
  minilora generate --model smollm2 "How is the weather?"
  minilora generate --adapter runs/mine
  minilora generate --adapter runs/mine -
  minilora generate --adapter runs/mine --temperature 0.7 "How is the weather?" "Who are you?\""""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora generate`` takes."""
    length = Flag("max_new_tokens", int, None, "tokens that an answer may have")
    add_model_flags(parser, as_trained(length, _LENGTH))
    about = "what the model is asked; each prompt in quotes, - for the lines of standard input"
    about += " (default: as the run of --adapter was asked)"
    parser.add_argument("prompt", nargs="*", default=[], help=about)


def add_model_flags(parser: argparse.ArgumentParser, length: Flag) -> None:
    """The flags of a command that asks a model; ``length`` is the one of its answers."""
    add_plugin_flag(parser)
    model = fields_of(Job, ("model", "quant", "double_quant", "device", "dtype", "attention", "trust_remote_code"))
    model["model"] = BASE
    for name, words in (("quant", QUANT_CHOICES), ("dtype", DTYPE_CHOICES)):
        model[name] = dataclasses.replace(model[name], choices=words)
    for name, otherwise in (("quant", "none"), ("dtype", AUTO), ("attention", AUTO)):
        model[name] = as_trained(model[name], otherwise)
    add_flags(parser, "model", model.values())
    add_adapter_flags(parser, required=False)
    heat = "of drawn tokens, a number >= 0: 0 takes the likeliest token, 1 draws by the model's own odds"
    system = Flag("system", str, None, 'a system turn that is put before each prompt; "" puts none')
    asked = [
        as_trained(system, "none"),
        length,
        Flag("temperature", float, 0.0, heat),
        Flag("seed", int, 0, "whole number >= 0 that drawn tokens follow from"),
    ]
    add_flags(parser, "generation", asked)


def run(arguments: argparse.Namespace) -> None:
    """Load, ask, print; with several prompts each stands above its answer."""
    check_words(arguments)
    record = recall(arguments, dtype=AUTO, attention=AUTO, system="", max_new_tokens=_LENGTH)
    check(arguments)
    prompts = _prompts(arguments.prompt) or (record.prompts if record else [])
    if not prompts:
        raise ConfigError("prompt: missing; see minilora generate --help")
    validate.texts("prompt", prompts)
    import torch

    from minilora.hf import answers
    from minilora.job.in_hand import answers_again
    from minilora.training.progress import Progress

    with Progress(0, sys.stderr):
        model, tokenizer, where = loaded(arguments, record)
    if sys.stderr.isatty():  # for a person who waits; what is piped on is the answer alone
        say(where, error=True)
    torch.manual_seed(arguments.seed)
    length, heat, system = arguments.max_new_tokens, arguments.temperature, arguments.system
    greedy = answers_again(record, model, tokenizer, prompts, length, system)
    for prompt in prompts:
        with Progress(0, sys.stderr):
            answer = answers(model, tokenizer, [prompt], length, heat, system)[0] if heat else next(greedy)
        say(f"> {prompt}\n{answer}\n" if len(prompts) > 1 else answer)


def _prompts(given: list[str]) -> list[str]:
    """What was given, with the lines of standard input in the place of ``-``."""
    prompts: list[str] = []
    for prompt in given:
        prompts += [line.strip() for line in sys.stdin if line.strip()] if prompt == "-" else [prompt]
    if given and not prompts:
        raise ConfigError("prompt -: standard input holds no line; wanted one prompt a line")
    return prompts


def loaded(arguments: argparse.Namespace, record: Record | None) -> tuple[Any, Any, str]:
    """Model and tokenizer as they are asked, and what they are in words; where they are not those of the run it is said."""
    from minilora.hf.dates import dated
    from minilora.hf.devices import choose

    place = choose(arguments.device, arguments.dtype, arguments.attention)
    model, tokenizer = base(arguments, record, place)
    if arguments.adapter:
        model = adapted(arguments, record, model, tokenizer, place)
    return model, tokenizer if record is None else dated(tokenizer, record.date), f"{arguments.model} on {place.said}"


def base(arguments: argparse.Namespace, record: Record | None, place: Place) -> tuple[Any, Any]:
    """Model without an adapter, packed as it is said or as it was for the run, and tokenizer."""
    from minilora.hf import load_model, load_tokenizer
    from minilora.job.in_hand import to_pack
    from minilora.training.progress import busy

    trust, quant = arguments.trust_remote_code, packing(arguments.quant or "none", arguments.double_quant)
    if arguments.quant is None and record is not None:
        quant = to_pack(record.packing)
    options = {"device": place.device, "quant": quant, "attention": arguments.attention}
    try:
        tokenizer = load_tokenizer(arguments.model, trust)
        with busy(f"loading {arguments.model}"):
            return load_model(arguments.model, place.dtype, trust, **options), tokenizer
    except CheckpointError as error:
        if not (named_by := getattr(arguments, "named_by", None)):
            raise
        raise CheckpointError(
            f"{error}; {named_by} names this base: --model takes the same one from another place"
        ) from None


def adapted(arguments: argparse.Namespace, record: Record | None, model: Any, tokenizer: Any, place: Place) -> Any:
    """The model with the adapter; where the base is not that of its run it is said. The tokenizer is as it was read."""
    from minilora import PeftModel
    from minilora.job.in_hand import differences
    from minilora.job.sessions import template_sha256
    from minilora.training.progress import busy

    with busy(f"loading {arguments.adapter}"):
        model = PeftModel.from_pretrained(model, arguments.adapter, **trust_of(arguments))
    if record is not None:
        found = differences(record, model, template_sha256(tokenizer), place.names["dtype"])
        tell_differences(arguments.adapter, found)
    return model


def check_model(arguments: argparse.Namespace) -> None:
    """What can be refused of a model before anything is read."""
    if arguments.quant is not None:
        check_quant(arguments.quant)
    check_place(arguments.device, arguments.dtype or AUTO, arguments.attention or AUTO)


def check_words(arguments: argparse.Namespace) -> None:
    """What can be refused before anything is read."""
    check_model(arguments)
    validate.whole("--seed", arguments.seed, 0, 2**63 - 1)
    if not 0 <= arguments.temperature < float("inf"):
        raise ConfigError(f"--temperature={arguments.temperature}: wanted a number >= 0; 0 is greedy")


def check(arguments: argparse.Namespace) -> None:
    """What can be refused once it is filled in."""
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={arguments.max_new_tokens}: wanted a whole number >= 1")

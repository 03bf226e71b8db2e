"""``minilora generate``: ask a model, with or without an adapter."""

from __future__ import annotations

import argparse
import dataclasses

from minilora.cli.adapters import add_adapter_flags, trust_of
from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.say import say
from minilora.errors import ConfigError
from minilora.files import validate
from minilora.hf.job import QUANT_CHOICES, Job

USAGE = "--model NAME [--adapter FOLDER] [options] PROMPT [PROMPT ...]"
EXAMPLES = """\
  minilora generate --model smollm2 "How is the weather?"
  minilora generate --model smollm2 --adapter runs/mine --quant nf4 --temperature 0.7 "How is the weather?" "Who are you?\""""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora generate`` takes."""
    model = fields_of(Job, ("model", "quant", "trust_remote_code"), quant="none")
    model["quant"] = dataclasses.replace(model["quant"], choices=QUANT_CHOICES)
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

    from minilora import PeftModel, QuantConfig, quantize_model
    from minilora.hf import answers, load_model, load_tokenizer
    from minilora.linear.layers import is_quantized

    trust = arguments.trust_remote_code
    tokenizer = load_tokenizer(arguments.model, trust)
    model = load_model(arguments.model, trust_remote_code=trust)
    if arguments.quant != "none" and not any(is_quantized(module) for module in model.modules()):
        quantize_model(model, QuantConfig(arguments.quant, double_quant=True))
    if arguments.adapter:
        model = PeftModel.from_pretrained(model, arguments.adapter, **trust_of(arguments))
    torch.manual_seed(arguments.seed)
    for prompt in arguments.prompt:
        said = answers(model, tokenizer, [prompt], arguments.max_new_tokens, arguments.temperature)[0]
        say(f"> {prompt}\n{said}\n" if len(arguments.prompt) > 1 else said)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.quant not in QUANT_CHOICES:
        raise ConfigError(f"--quant={arguments.quant!r}: wanted one of {', '.join(QUANT_CHOICES)}")
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={arguments.max_new_tokens}: wanted a whole number >= 1")
    validate.whole("--seed", arguments.seed, 0, 2**63 - 1)
    if not 0 <= arguments.temperature < float("inf"):
        raise ConfigError(f"--temperature={arguments.temperature}: wanted a number >= 0; 0 is greedy")

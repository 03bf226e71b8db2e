"""The command line: parse, call, print. ``minilora demo | train | generate | plan | bench | quantize | merge | export``.

Exit code 2 means the input was wrong, 1 that the work failed, 130 that it was interrupted; a traceback comes only with ``--debug``.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import select
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from minilora import __version__
from minilora.cli import bench, demo, plan
from minilora.cli.jobs import run_job
from minilora.cli.parser import Parser, one_of
from minilora.cli.toml import REGEX_FLAGS, read_toml
from minilora.errors import ConfigError, MiniLoraError
from minilora.files import validate
from minilora.lora.config import LoraConfig
from minilora.training.loop import TrainConfig

_LORA_FLAGS = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "bias",
    "use_rslora",
    "modules_to_save",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = _parser()
        if not words:
            parser.print_help(sys.stderr)
            return 2
        arguments = parser.parse_args(words)
        _quiet_libraries()
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("minilora: interrupted; what was saved before is whole", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + 13  # as shells count SIGPIPE
        return _fail(error, "--debug" in words)
    return 0


def _fail(error: Exception, debug: bool) -> int:
    """Say in one line what went wrong; the traceback before it only if asked for."""
    if debug:
        traceback.print_exception(error)
    known = isinstance(error, MiniLoraError)
    kind, hint = ("", "") if known else (type(error).__name__, "" if debug else "run again with --debug")
    said = " ".join(str(error).split())[:1200]
    print("minilora:", "; ".join(filter(None, [": ".join(filter(None, [kind, said])), hint])), file=sys.stderr)
    return error.exit_code if isinstance(error, MiniLoraError) else 1


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that its reader has left (``| head``); what is still to be written then goes nowhere."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except OSError:  # a stream without a file
        return False
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _quiet_libraries() -> None:
    """Bars and notices of libraries would run across our own display; a user's own settings win."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TQDM_DISABLE", "1"),
    ):
        os.environ.setdefault(name, value)


def _parser() -> Parser:
    parser = Parser(prog="minilora", description="LoRA and QLoRA from scratch: fine-tune, ask, merge.")
    parser.add_argument("--version", action="version", version=f"minilora {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, run, flags, text in (
        ("demo", demo.run, demo.flags, "fine-tune SmolLM2-135M in four bits on this machine, in minutes"),
        ("train", _train, _train_flags, "fine-tune a model on a JSONL file"),
        ("generate", _generate, _generate_flags, "ask a model, with or without an adapter"),
        ("plan", plan.run, plan.flags, "say what a training step will hold in memory, and measure it"),
        ("bench", bench.run, bench.flags, "run one fine-tuning job in minilora and in PEFT, and compare"),
        ("quantize", _quantize, _quantize_flags, "pack a model into 4 bits, as bitsandbytes stores it"),
        ("merge", _merge, _merge_flags, "fold an adapter into its model and save it"),
        ("export", _export, _export_flags, "write an adapter for vLLM, llama.cpp or MLX"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        flags(command)
    parser.verbs = tuple(commands.choices)
    return parser


# ---- train


def _train_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", help="TOML file with these flags as keys (lora_alpha = 16); a flag given here wins")
    for name, kind, default, text in _train_options():
        flag = "--" + name.replace("_", "-")
        shown = f"{text} (default: {default})" if text else f"default: {default}"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=shown)
        elif kind is list:
            parser.add_argument(flag, nargs="+", default=None, help=shown)
        else:
            parser.add_argument(flag, type=kind, default=None, help=shown)


def _train_options() -> list[tuple[str, type, Any, str]]:
    """``(name, type, default, help)`` of every setting of a job, read from the dataclasses."""
    from minilora.hf.finetune import Job

    help_of = {
        "model": "hub id, local folder, or smollm2",
        "data": "JSONL with 'messages', 'prompt' and 'completion', or 'text'",
        "out": "run folder",
        "target_modules": "names, one regex, or all-linear",
        "prompts": "asked before and after, for the report",
        "date": "the day that the chat template takes for today, as 2025-01-31",
        "quant": "none, or a format: nf4, nf3, int8 ...",
        "dtype": "float32, bfloat16 or float16",
        "resume": "go on with the run in --out, to the same bits",
        "overwrite": "replace the run in --out",
    }
    options = []
    for cls, names in ((Job, None), (LoraConfig, _LORA_FLAGS), (TrainConfig, None)):
        hints = get_type_hints(cls)
        for entry in dataclasses.fields(cls):
            if entry.name not in ("lora", "training") and (names is None or entry.name in names):
                default = "all-linear" if entry.name == "target_modules" else entry.default
                default = None if default is dataclasses.MISSING else default
                options.append((entry.name, _flag_type(hints[entry.name]), default, help_of.get(entry.name, "")))
    return options


def _flag_type(hint: Any) -> type:
    """How a field is given on the command line: a bool, number, text, or (for anything that takes several names) a list."""
    kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in (bool, float, int):
        if kind in kinds:
            return kind
    return str if kinds == (str,) else list


def _train(arguments: argparse.Namespace) -> None:
    run_job(_job(arguments))


def _job(arguments: argparse.Namespace) -> Any:
    from minilora.hf.finetune import Job

    known = {name: kind for name, kind, _, _ in _train_options()}
    settings = read_toml(arguments.config, known) if arguments.config else {}
    settings |= {name: value for name in known if (value := getattr(arguments, name)) is not None}
    for name in ("model", "data", "out"):
        if not settings.get(name):
            raise ConfigError(f'--{name} is missing; give it as a flag or as {name} = "..." in the TOML file')
    for name in REGEX_FLAGS:
        if isinstance(value := settings.get(name), list) and len(value) == 1:
            settings[name] = value[0] if value[0] == "all-linear" or not value[0].replace("_", "").isalnum() else value
    alpha = settings.get("lora_alpha")
    if isinstance(alpha, float) and alpha.is_integer():
        settings["lora_alpha"] = int(alpha)
    lora = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"} | {
        n: settings.pop(n) for n in _LORA_FLAGS if n in settings
    }
    training = {
        entry.name: settings.pop(entry.name) for entry in dataclasses.fields(TrainConfig) if entry.name in settings
    }
    return Job(**settings, lora=LoraConfig(**lora), training=TrainConfig(**training))


# ---- generate, merge


def _adapter_flags(parser: argparse.ArgumentParser) -> None:
    """What every command that loads an adapter can be told about it."""
    parser.add_argument("--expect-sha256", help="refuse any other adapter; save_adapter returns this digest")
    parser.add_argument(
        "--allow-other-base", action="store_true", help="load it on another base than it was trained on"
    )


def _generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="+", help="each prompt in quotes")
    parser.add_argument("--model", required=True, help="hub id, local folder, or smollm2")
    parser.add_argument("--adapter", help="adapter folder (PEFT's layout)")
    _adapter_flags(parser)
    parser.add_argument("--quant", default="none", help="none, or a format: nf4, nf3, int8 ... (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of drawn tokens (default: %(default)s)")


def _trust(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"expect_sha256": arguments.expect_sha256, "allow_other_base": arguments.allow_other_base}


def _generate(arguments: argparse.Namespace) -> None:
    import torch

    from minilora import PeftModel, QuantConfig, quantize_model
    from minilora.hf import answers, load_model, load_tokenizer
    from minilora.linear.layers import is_quantized

    _check_generate(arguments)
    tokenizer, model = load_tokenizer(arguments.model), load_model(arguments.model)
    if arguments.quant != "none" and not any(is_quantized(module) for module in model.modules()):
        quantize_model(model, QuantConfig(arguments.quant, double_quant=True))
    if arguments.adapter:
        model = PeftModel.from_pretrained(model, arguments.adapter, **_trust(arguments))
    torch.manual_seed(arguments.seed)
    for prompt in arguments.prompt:
        said = answers(model, tokenizer, [prompt], arguments.max_new_tokens, arguments.temperature)[0]
        print(f"> {prompt}\n{said}\n" if len(arguments.prompt) > 1 else said)


def _check_generate(arguments: argparse.Namespace) -> None:
    from minilora.hf.finetune import QUANT_CHOICES

    if arguments.quant not in QUANT_CHOICES:
        raise ConfigError(f"--quant={arguments.quant!r}: wanted one of {', '.join(QUANT_CHOICES)}")
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={arguments.max_new_tokens}: wanted a whole number >= 1")
    validate.whole("--seed", arguments.seed, 0, 2**63 - 1)
    if not 0 <= arguments.temperature < float("inf"):
        raise ConfigError(f"--temperature={arguments.temperature}: wanted a number >= 0; 0 is greedy")


def _merge_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub id, local folder, or smollm2")
    parser.add_argument("--adapter", required=True, help="adapter folder (PEFT's layout)")
    _adapter_flags(parser)
    parser.add_argument("--out", required=True, help="folder for the merged model; must not exist yet, or be empty")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")


def _merge(arguments: argparse.Namespace) -> None:
    from minilora.hf.finetune import DTYPES
    from minilora.hf.merge import merge_to_folder

    if arguments.dtype not in DTYPES:
        raise ConfigError(f"--dtype={arguments.dtype!r}: wanted one of {', '.join(DTYPES)}")
    dtype = DTYPES[arguments.dtype]
    place = merge_to_folder(arguments.model, arguments.adapter, arguments.out, dtype, **_trust(arguments))
    print(f"merged model in {place}")


def _quantize_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="hub id, local folder, or smollm2")
    parser.add_argument("--out", required=True, help="folder for the packed model; must not exist yet, or be empty")
    parser.add_argument("--format", default="nf4", help="nf4 or fp4 (default: %(default)s)")
    parser.add_argument("--blocksize", type=int, default=64, help="weights to a scale (default: %(default)s)")
    parser.add_argument("--double-quant", action=argparse.BooleanOptionalAction, default=True, help="8-bit scales")
    parser.add_argument("--scale", default="absmax", help="absmax, mse or weighted (default: %(default)s)")
    parser.add_argument(
        "--signed-scale", action=argparse.BooleanOptionalAction, default=False, help="allow negative scales"
    )
    parser.add_argument("--calibration", help="JSONL as for train; needed by --scale weighted")
    parser.add_argument("--dtype", default="float32", help="of what stays dense: float32, bfloat16 or float16")


def _quantize(arguments: argparse.Namespace) -> None:
    from minilora.hf.finetune import DTYPES
    from minilora.hf.quantize import quantize_to_folder
    from minilora.quant.config import QuantConfig

    if arguments.dtype not in DTYPES:
        raise ConfigError(f"--dtype={arguments.dtype!r}: wanted one of {', '.join(DTYPES)}")
    if arguments.format not in ("nf4", "fp4"):
        raise ConfigError(
            f"--format={arguments.format!r}: wanted nf4 or fp4, which bitsandbytes' files hold; others live in memory only"
        )
    config = QuantConfig(
        arguments.format, arguments.blocksize, arguments.double_quant, arguments.scale, arguments.signed_scale
    )
    kept = quantize_to_folder(arguments.model, arguments.out, config, arguments.calibration, DTYPES[arguments.dtype])
    print(f"packed model in {arguments.out}: {kept / 1e6:.0f} MB; use it as --model {arguments.out}")


def _export_flags(parser: argparse.ArgumentParser) -> None:
    from minilora.store.export import TARGETS

    parser.add_argument("--adapter", required=True, help="adapter folder (PEFT's layout)")
    _adapter_flags(parser)
    parser.add_argument(
        "--for", dest="target", required=True, type=one_of(TARGETS), help=f"who will read it: {', '.join(TARGETS)}"
    )
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--model", help="its base model; needed for variants other than LoRA and rsLoRA")


def _export(arguments: argparse.Namespace) -> None:
    from minilora.hf.folders import refuse_occupied
    from minilora.store.export import export_adapter, export_folder

    refuse_occupied(arguments.out)
    if arguments.model:
        from minilora import PeftModel
        from minilora.hf import load_model

        model = PeftModel.from_pretrained(load_model(arguments.model), arguments.adapter, **_trust(arguments))
        rank = export_adapter(model, arguments.out, arguments.target)
    else:
        rank = export_folder(arguments.adapter, arguments.out, arguments.target, arguments.expect_sha256)
    hint = f"; start vLLM with --max-lora-rank {rank} or more" if arguments.target == "vllm" else ""
    print(f"{arguments.out}: adapter for {arguments.target}, rank {rank}, scale 1{hint}")

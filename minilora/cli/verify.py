"""``minilora verify``: ask a server, or a program in this process, whether it applies an adapter as it was trained."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import Any

from minilora.cli.flags import Flag, add_flags
from minilora.cli.parser import one_of
from minilora.cli.say import say
from minilora.errors import ConfigError
from minilora.files import validate

_PROGRAMS = ("peft", "transformers", "llama.cpp")
USAGE = "FOLDER (--server URL | --in PROGRAM) [options]"
EXAMPLES = """\
  minilora verify runs/mine --server http://127.0.0.1:8080
  minilora verify runs/mine --server http://127.0.0.1:8000 --model mine
  minilora verify runs/mine --in peft
  minilora verify runs/mine --in llama.cpp --base served.gguf"""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora verify`` takes."""
    parser.add_argument(
        "folder", help="adapter folder with a probe.json, as a run or minilora seal leaves it (required)"
    )
    server = Flag("server", str, None, "address of an OpenAI-compatible server: vLLM, llama.cpp, SGLang, Ollama")
    program = Flag(
        "program",
        str,
        None,
        "ask this program in this process instead",
        _PROGRAMS,
        spelt="--in",
        check=one_of(_PROGRAMS),
    )
    named = "the adapter's name on a server of several models, or with --in the base model"
    model = Flag("model", str, None, named, otherwise="as the run of FOLDER was trained")
    base = Flag(
        "base",
        str,
        None,
        'GGUF file of the base that --in llama.cpp serves; "smollm2.gguf" is that of the demo\'s model',
    )
    made = "the adapter as GGUF, for --in llama.cpp; without it, it is written from FOLDER as minilora export does"
    lora = Flag("lora", str, None, made)
    timeout = Flag("timeout", float, 60.0, "number of seconds that an answer may take")
    key = Flag("key_variable", str, None, "environment variable with the server's API key")
    add_flags(parser, "model", [server, program, model, base, lora, timeout, key])
    packing = Flag(
        "any_quantization",
        bool,
        False,
        "exit with 0 where the adapter is applied on another quantization of its base, too",
    )
    as_json = Flag("json", bool, False, "print the verdict as JSON, for a program to read")
    add_flags(parser, "output", [packing, as_json])


def run(arguments: argparse.Namespace) -> int:
    """Ask, say what is the matter, and exit with 0 (right), 1 (wrong) or 2 (cannot be told)."""
    if (arguments.server is None) == (arguments.program is None):
        raise ConfigError("--server: give the address of a server, or --in with a program, and not both")
    for name in ("base", "lora"):
        if (value := getattr(arguments, name)) and arguments.program != "llama.cpp":
            raise ConfigError(f"--{name}={value!r}: is for --in llama.cpp; leave it out")
    validate.number("--timeout", arguments.timeout, 0.001, 86_400)
    key = ""
    if arguments.key_variable and not (key := os.environ.get(arguments.key_variable, "")):
        raise ConfigError(f"--key-variable={arguments.key_variable!r}: no such environment variable, or an empty one")
    from minilora.hf.load import served_file
    from minilora.proof.verified import verify, verify_in
    from minilora.training.progress import Progress

    with Progress(0, sys.stderr):
        if arguments.server is not None:
            found = verify(arguments.folder, arguments.server, arguments.model or "", arguments.timeout, key)
        else:
            model = arguments.model or _base(arguments.folder)
            base = served_file(arguments.base) if arguments.base else ""
            lora = arguments.lora or (_adapted(arguments) if base else None) or ""
            found = verify_in(arguments.folder, arguments.program, model, base, lora)
    code = 0 if found.kind == "another packing" and arguments.any_quantization else found.code
    if arguments.json:
        say(json.dumps(asdict(found) | {"code": code}, indent=1))
    else:
        say(f"{arguments.folder}: {found.text}")
    return code


def _adapted(arguments: argparse.Namespace) -> Any:
    """The model with the adapter, where this is not all in its folder, for the GGUF LoRA to be written from; else None."""
    from minilora.cli.export import adapted

    trust = {"trust_remote_code": False, "expect_sha256": None, "allow_other_base": False}
    asked = {"adapter": arguments.folder, "model": arguments.model, "target": "llama.cpp", "base": arguments.base}
    return adapted(argparse.Namespace(**asked, component=None, **trust))


def _base(folder: str) -> str:
    """The base as the run in the folder was given it, else as the adapter names it."""
    from minilora.job.record import read_record
    from minilora.store.adapter_files import read_config

    record = read_record(folder)
    return record.model if record else read_config(folder).base_model_name_or_path or ""

"""The command line: parse, call, print. Each of COMMANDS is a file of this folder.

Exit code 2 means the input was wrong, 1 that the work failed, 130 that it was interrupted; a traceback comes only with ``--debug``.
Parsing and ``--help`` need no torch: a command imports what it works with when it runs.
"""

from __future__ import annotations

import os
import select
import sys
import warnings
from collections.abc import Sequence

from minilora import __version__
from minilora.cli.parser import Parser
from minilora.cli.say import say
from minilora.errors import MiniLoraError, printable

# Each is a file of this folder, which is imported when its command is called.
COMMANDS = {
    "demo": "fine-tune SmolLM2-135M in four bits on this machine, in minutes",
    "init": "write a settings file and ten lines of data to begin with",
    "train": "fine-tune a model on your own data",
    "sweep": "fine-tune a model in many ways at the same time, and rank them",
    "generate": "ask a model, with or without an adapter",
    "chat": "talk with a model, with or without an adapter",
    "look": "show examples token by token, as training sees them",
    "info": "say what an adapter folder, a run or a packed model is",
    "doctor": "say what is wrong with an adapter, whoever made it",
    "compare": "put runs side by side: settings, losses, answers",
    "plan": "say what a training step will hold in memory, and measure it",
    "bench": "run one fine-tuning job in minilora and in PEFT, and compare",
    "lab": "try the claims of the field again, each with a verdict",
    "learn": "do the exercises of the course, and have them checked",
    "quantize": "pack a model into few bits, and save it",
    "merge": "fold an adapter into its model and save it",
    "export": "write an adapter for vLLM, llama.cpp, Ollama, MLX or diffusers",
    "seal": "keep in an adapter folder how a server can be verified by it",
    "verify": "ask a server whether it applies an adapter, and how",
    "push": "put a run with its model card on the Hugging Face Hub",
}
_ENDS = """\
A first run: minilora demo. The flags of a command: minilora COMMAND --help.
Exit codes: 0 done, 1 the work failed, 2 the input was wrong, 130 and 143 ended
by Ctrl-C and SIGTERM."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words, in_python = list(sys.argv[1:] if argv is None else argv), warnings.formatwarning
    try:
        parser = make_parser()
        if not words:
            parser.print_help(sys.stderr)
            return 2
        if words[0] == "help":  # what many type first
            words = [*words[1:2], "--help"]
        arguments = parser.parse_args(words)
        _quiet_libraries()
        warnings.formatwarning = _one_line
        if files := getattr(arguments, "plugin", None):
            from minilora.cli.plugins import load_plugins

            load_plugins(files)
        code = arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        if _speaks():
            say("minilora: interrupted; what was saved before is whole", error=True)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + 13  # as shells count SIGPIPE
        return _fail(error, "--debug" in words)
    finally:
        warnings.formatwarning = in_python
    return code or 0


def make_parser() -> Parser:
    """The parser of all commands; what it returns has ``run``, which gets the rest."""
    parser = Parser("minilora", "LoRA and QLoRA from scratch: fine-tune, ask, merge.")
    parser.usage, parser.epilog = "minilora [--help] [--version] COMMAND ...", _ENDS
    parser.add_argument(
        "--version", action="version", version=f"minilora {__version__}", help="show the version and exit"
    )
    for name, about in COMMANDS.items():
        parser.add_command(name, about, f"minilora.cli.{name}")
    return parser


def _fail(error: Exception, debug: bool) -> int:
    """Say in one line what went wrong; the traceback before it only if asked for."""
    if debug:
        import traceback

        say("".join(traceback.format_exception(error)).rstrip(), error=True)
    known, told = isinstance(error, MiniLoraError), getattr(error, "told", None)
    if told or (told is None and not _speaks()):  # another process says it
        return error.exit_code if isinstance(error, MiniLoraError) else 1
    kind, hint = ("", "") if known else (type(error).__name__, "" if debug else "run again with --debug")
    said = printable(" ".join(str(error).split())[:1200])
    say("minilora: " + "; ".join(filter(None, [": ".join(filter(None, [kind, said])), hint])), error=True)
    return error.exit_code if isinstance(error, MiniLoraError) else 1


def _speaks() -> bool:
    """Whether this process says what all of its machine have alike, a mistyped flag above all: torchrun gives them one command."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that its reader has left (``| head``); what is still to be written then goes nowhere."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except OSError:  # a stream without a file
        return False
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _one_line(message: Warning | str, category: type[Warning], *where: object, **line: object) -> str:
    """A warning without the place in some library that Python names: nobody who types a command called it there."""
    kind = "warning" if category is UserWarning else category.__name__
    return f"minilora: {kind}: {message}\n"


def _quiet_libraries() -> None:
    """Bars and notices of libraries would run across our own display; a user's own settings win."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TQDM_DISABLE", "1"),
    ):
        os.environ.setdefault(name, value)

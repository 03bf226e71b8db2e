"""``minilora chat``: talk with a model and its adapters; from a pipe, each line is a question."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from minilora.cli import generate
from minilora.cli.flags import Flag
from minilora.cli.remembered import recall
from minilora.cli.say import say, write
from minilora.errors import MiniLoraError
from minilora.hf.places import AUTO

if TYPE_CHECKING:
    from minilora.hf.chat import Chat
    from minilora.job.voices import Voices

USAGE = "[--model NAME] [--adapter FOLDER] [options]"
EXAMPLES = """\
  minilora chat --model smollm2
  minilora chat --adapter runs/mine
  minilora chat --adapter runs/mine --system "You answer in one sentence." --temperature 0.7"""

_LENGTH = 256  # tokens of an answer
_HELP = """\
/adapter NAME      let a loaded adapter speak; /adapter FOLDER loads one; alone it lists them
/base              ask the base model each question too, beside the adapter; again: no more
/system TEXT       the system turn before the conversation; alone it takes it away
/reset             forget the conversation
/help              this list
/quit              leave, as Ctrl-D and two Ctrl-C do; one Ctrl-C ends an answer"""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora chat`` takes: as ``generate``, without prompts."""
    length = Flag("max_new_tokens", int, _LENGTH, "tokens that an answer may have")
    generate.add_model_flags(parser, length)


def run(arguments: argparse.Namespace) -> None:
    """Load once, then answer until the end of the input."""
    generate.check_words(arguments)
    record = recall(arguments, dtype=AUTO, attention=AUTO, system="")
    generate.check(arguments)
    import torch

    from minilora.hf.chat import Chat
    from minilora.job.voices import Voices
    from minilora.training.progress import Progress

    person = sys.stdin.isatty()
    with Progress(0, sys.stderr):
        model, tokenizer, where = generate.loaded(arguments, record)
    torch.manual_seed(arguments.seed)
    voices = Voices(model, arguments.adapter, allow_other_base=arguments.allow_other_base)
    chat = Chat(model, tokenizer, arguments.system, arguments.max_new_tokens, arguments.temperature)
    if person:
        adapter = f" with {arguments.adapter}" if arguments.adapter else ""
        say(f"{where}{adapter}; /help lists the commands, Ctrl-D leaves")
    Talk(chat, voices, person).go_on()


class Talk:
    """A conversation with its commands.

    Args:
        chat: with whoever speaks now. voices: the adapters. person: whether somebody types; of a pipe each question is shown again.
    """

    def __init__(self, chat: Chat, voices: Voices, person: bool) -> None:
        self.chat, self.voices, self.person = chat, voices, person
        self.base: Chat | None = None  # the same conversation with the base model, where it is compared

    def go_on(self) -> None:
        """Read and answer until the input ends, ``/quit`` or the second Ctrl-C."""
        if self.person:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (so that a line can be edited)
        stopped = False
        while True:
            try:
                line = input("> " if self.person else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                if stopped or not self.person:
                    break
                stopped = True
                say("\n(Ctrl-C again or Ctrl-D leaves)")
                continue
            stopped = False
            if line in ("/quit", "/exit"):
                return
            if line:
                stopped = self._take(line)
        if self.person:
            say("")

    def _take(self, line: str) -> bool:
        """A command or a question; returns whether Ctrl-C ended the answer. What fails is told to a person, and ends a pipe."""
        try:
            return self._command(line) if line.startswith("/") else self._ask(line)
        except MiniLoraError as error:
            if not self.person:
                raise
            say(str(error), error=True)
            return False

    def _ask(self, question: str) -> bool:
        if not self.person:
            say(f"> {question}")
        sides: dict[str, Chat] = {"": self.chat}
        if self.base is not None:
            sides = {"base: ": self.base, f"{self.voices.current}: ": self.chat}
        stopped = False
        for label, chat in sides.items():
            write(label)
            answer = chat.ask(question, write, _tell_dropped)
            say(" (stopped)" if answer.stopped else "")
            stopped = stopped or answer.stopped
        if not self.person:
            say("")
        return stopped

    def _command(self, line: str) -> bool:
        name, _, rest = line[1:].partition(" ")
        known = {"adapter": self._adapter, "base": self._base, "system": self._system, "reset": self._reset}
        if name in known:
            known[name](rest.strip())
        else:
            say(_HELP if name == "help" else f"/{name}: no such command\n{_HELP}")
        return False

    def _adapter(self, wanted: str) -> None:
        if not wanted:
            names = [f"{name} (speaks)" if name == self.voices.current else name for name in self.voices.names]
            say(", ".join(names) or "no adapter is loaded; /adapter FOLDER loads one")
            return
        name = self.voices.speak(wanted)
        self.chat.model = self.voices.model
        say("\n".join([f"{name} speaks; /reset forgets what was said before", *_notes(wanted, self.chat)]))

    def _base(self, _: str) -> None:
        if not self.voices.names:
            say("no adapter is loaded, so it is the base model that answers; /adapter FOLDER loads one")
        elif self.base is None:
            self.base = self.chat.beside(self.voices.without)
            say(f"each question goes to the base model and to {self.voices.current}; /base ends it")
        else:
            self.base = None
            say(f"{self.voices.current} answers alone")

    def _system(self, text: str) -> None:
        for chat in filter(None, (self.chat, self.base)):
            chat.system = text
        say(f"system: {text}" if text else "no system turn")

    def _reset(self, _: str) -> None:
        for chat in filter(None, (self.chat, self.base)):
            chat.turns.clear()
        say("the conversation is forgotten")


def _tell_dropped(pairs: int) -> None:
    what = (
        "the oldest question and its answer no longer fit"
        if pairs == 1
        else f"the {pairs} oldest questions no longer fit"
    )
    say(f"({what} the context of the model, and are forgotten)", error=True)


def _notes(folder: str, chat: Any) -> list[str]:
    """What the run of an adapter had otherwise than this conversation."""
    from minilora.job.record import read_record
    from minilora.job.sessions import packing_of

    record = read_record(folder)
    found: list[str] = []
    if record is not None and str(here := packing_of(chat.model)) != str(record.packing):
        found.append(f"(it was trained on a base that was {record.packing}; this one is {here})")
    if record is not None and record.system != chat.system:
        found.append(
            f"(its run had {f'the system turn {record.system!r}' if record.system else 'no system turn'}: /system)"
        )
    return found

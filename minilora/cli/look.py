"""``minilora look``: examples token by token, as training sees them, with the loss of each token before and after."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.cli import generate
from minilora.cli.adapters import add_adapter_flags
from minilora.cli.flags import Flag, add_flags
from minilora.cli.plugins import add_plugin_flag
from minilora.cli.remembered import BASE, as_trained, recall
from minilora.cli.say import say, say_styled
from minilora.cli.settings import GROUPS, settings
from minilora.errors import ConfigError
from minilora.files import validate
from minilora.hf.places import AUTO
from minilora.job.given import job_from

if TYPE_CHECKING:
    from minilora.job.look import Picked
    from minilora.job.record import Record
    from minilora.job.settings import Job

USAGE = "[--model NAME] [--data FILE] [--adapter FOLDER] [options]"
EXAMPLES = """\
  minilora look --model smollm2 --data chats.jsonl
  minilora look --adapter runs/mine --held --out lens.html
  minilora look --model smollm2 --data chats.jsonl --longest --no-losses"""

_DATA = (*GROUPS["data"], "seed")  # the seed draws what is held out
_HIGHEST = 5  # tokens of an example that are named for their loss
_HUES = (
    "",
    *(f"black on color({number})" for number in (230, 223, 216, 209, 202)),
)  # of a terminal, as the page's colours


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora look`` takes."""
    add_plugin_flag(parser)
    every = settings()
    model = {name: every[name] for name in GROUPS["model"]} | {"model": BASE}
    for name, otherwise in (("quant", "none"), ("dtype", AUTO), ("attention", AUTO)):
        model[name] = as_trained(model[name], otherwise)
    add_flags(parser, "model", model.values())
    data = {name: as_trained(every[name], _word(every[name].default)) for name in _DATA}
    data["data"] = Flag("data", list, None, every["data"].about, otherwise=BASE.otherwise)
    which = [
        Flag("examples", int, 4, "examples that are shown, a whole number >= 1"),
        Flag("longest", bool, False, "show the longest examples in the place of the first"),
        Flag("held", bool, False, "show examples that are held out in the place of those that are learnt from"),
    ]
    add_flags(parser, "data", [*data.values(), *which])
    add_adapter_flags(parser, required=False)
    losses = "compute the loss of each token, which loads the model; without it the config and the tokenizer are enough"
    page = Flag("html", str, None, "write the examples as a page into this file", spelt="--out")
    add_flags(parser, "output", [Flag("losses", bool, True, losses), page])


def _word(default: Any) -> object:
    """A default as a word of a help text."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "none" if default in ("", ()) else default


def run(arguments: argparse.Namespace) -> None:
    """Encode as training does, ask the model, print, and write the page if asked; nothing else is changed."""
    validate.whole("examples", arguments.examples, 1)
    if arguments.html and Path(arguments.html).is_dir():
        raise ConfigError(f"--out={arguments.html!r} is a folder; wanted a file such as lens.html")
    generate.check_model(arguments)
    own_data = arguments.data is not None
    record = recall(arguments, dtype=AUTO, attention=AUTO)
    job = _job(arguments, record)
    from minilora.job.look import pick
    from minilora.training.progress import Progress

    with Progress(0, sys.stderr):
        picked = pick(job, arguments.examples, arguments.longest, arguments.held, _beside)
        if record is not None and not own_data and (strange := picked.strange(record)):
            _beside(f"{strange}: not the data that the run was trained on")
        before, after = _losses(arguments, record, picked) if arguments.losses else ((), ())
        examples = picked.pictured(before, after)
    _show(examples)
    if arguments.html:
        _write(arguments, job, examples)


def _beside(line: str) -> None:
    say(line, error=True)


def _job(arguments: argparse.Namespace, record: Record | None) -> Job:
    """A job with such data: what is not given is as the run had it, else as ``minilora train`` would have it."""
    known = {name: record.settings[name] for name in _DATA if record and name in record.settings}
    if record is not None:
        known["date"] = record.date
    given = {name: value for name in _DATA if (value := getattr(arguments, name)) is not None}
    if "data" in given:  # other files; those that the run evaluated on are no part of them
        known.pop("eval_data", None)
    if not known.get("data") and not given.get("data"):
        raise ConfigError("--data: missing, and no run remembers it; wanted files, folders or data sets")
    model = {name: getattr(arguments, name) for name in ("model", "device", "dtype", "attention", "trust_remote_code")}
    return job_from({**known, **given, **model, "out": "nowhere"})  # nothing is trained, so nothing is written there


def _losses(arguments: argparse.Namespace, record: Record | None, picked: Picked) -> tuple[Any, Any]:
    """Of each example, of each token: of the base as it is loaded, and then with the adapter."""
    from minilora.hf.devices import choose

    place = choose(arguments.device, arguments.dtype, arguments.attention)
    model, tokenizer = generate.base(arguments, record, place)
    before = picked.losses(model)
    if not arguments.adapter:
        return before, ()
    return before, picked.losses(generate.adapted(arguments, record, model, tokenizer, place))


# ---- on a terminal


def _show(examples: Sequence[Mapping[str, Any]]) -> None:
    """Each example in lines: its words by role, in colours where rich can show them, and the tokens with the highest loss."""
    from minilora.report.lens import header

    for number, example in enumerate(examples):
        warning = f"\nwarning: {example['warning']}" if example["warning"] else ""
        say(f"{chr(10) * (number > 0)}{header(example)}{warning}")
        for name, pieces in _lines(example):
            say_styled([(f"  {name}", ""), *pieces])
        if highest := _highest(example):
            say(f"  {highest}")


def _lines(example: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """For each run of tokens of one role that count alike: what they are, and text and style of each."""
    from minilora.report.lens import MOST, level, seen, state, window

    tokens, shown = example["tokens"], window(example["tokens"], MOST)
    losses = example["after"] or example["before"] or [None] * len(tokens)
    names = {at: (tokens[at]["role"] or "tokens", state(tokens[at])) for at in shown}
    widths = [max(len(name[place]) for name in names.values()) + 2 for place in (0, 1)]
    for name, places in groupby(shown, key=names.__getitem__):
        pieces = []
        for at in places:
            marks = ["underline"] * tokens[at]["counts"] + ["strike"] * tokens[at]["cut"]
            hue = "" if losses[at] is None else _HUES[level(losses[at])]
            pieces.append((seen(tokens[at]["text"]), " ".join(filter(None, [*marks, hue]))))
        yield "".join(word.ljust(width) for word, width in zip(name, widths, strict=True)), pieces
    if left := len(tokens) - len(shown):
        yield f"({left:,} tokens more are not shown)", []


def _highest(example: Mapping[str, Any]) -> str:
    """The tokens that count and have the highest loss, in words."""
    from minilora.report.lens import number, seen

    kinds = [example[kind] for kind in ("before", "after") if example[kind]]
    if not kinds:
        return ""
    own = [at for at, token in enumerate(example["tokens"]) if token["counts"]]
    own.sort(key=lambda at: -(kinds[-1][at] if kinds[-1][at] == kinds[-1][at] else float("inf")))
    told = [
        f"{seen(example['tokens'][at]['text'])} {' -> '.join(number(kind[at]) for kind in kinds)}"
        for at in own[:_HIGHEST]
    ]
    return f"highest loss: {', '.join(told)}"


def _write(arguments: argparse.Namespace, job: Job, examples: Sequence[Mapping[str, Any]]) -> None:
    """The page; its folder is made."""
    from minilora.files.write import write_file
    from minilora.report.frame import page
    from minilora.report.lens import STYLE, lens_section

    place = Path(arguments.html)
    place.parent.mkdir(parents=True, exist_ok=True)
    model = f"{arguments.model}{f' with {arguments.adapter}' if arguments.adapter else ''}"
    lead = "Each example as the model reads it in training."
    if arguments.losses:
        lead += " The loss of a token is that of predicting it from those before it, on the model alone (before)"
        lead += " and with the adapter (after)." if arguments.adapter else "."
    body = lens_section("Token by token", examples, lead)
    data = [job.data] if isinstance(job.data, str) else job.data
    write_file(place, page(f"minilora look: {model}", ", ".join(data), (), body, STYLE, pictures=False))
    say(f"\n{place}: open it in a browser")

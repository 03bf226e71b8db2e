"""``probe.json``: what an adapter's base, the adapted model, and the model with the adapter misread say to a few questions.

A question is a row of token ids; its answer are the log-probabilities of the token that comes next. They stand for each of several
*curves*: the base, the adapted model, the adapter at other scales, and mistakes that programs are known to make. So whoever asks a server
the same questions can tell which of them it answers as. A file is data: every field is checked. Next file: ``proof/curves.py``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import CheckpointError, ConfigError, MiniLoraError
from minilora.files import validate
from minilora.files.parse import parse_json
from minilora.files.read import read_files, refuse_path
from minilora.files.write import write_file
from minilora.store.adapter_files import CONFIG_FILE, WEIGHTS_FILE, adapter_sha256

__all__ = [
    "ADAPTED",
    "BASE",
    "PROBE_FILE",
    "Chat",
    "Curve",
    "Probe",
    "Question",
    "digest_of",
    "read_probe",
    "write_probe",
]

PROBE_FILE = "probe.json"
BASE, ADAPTED = "base", "adapted"  # curves that every probe has
_VERSION = 1
_KINDS = ("scale", "misread")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_QUESTIONS, _MOST_CURVES, _MOST_IDS, _MOST_TOKENS = 256, 256, 32_768, 4_096
_LOWEST = -1e5  # a log-probability
_LARGEST_ID = 2**31 - 1


@dataclass(frozen=True)
class Curve:
    """One way in which an adapter may be applied.

    Attributes:
        name: "base", "adapted", or what is done. kind: "scale", all of the adapter at ``scale``; "misread", a mistake, ``name`` says which.
        listed: how many of its likeliest tokens every question has at the least.
    """

    name: str
    kind: str
    scale: float
    listed: int


@dataclass(frozen=True)
class Question:
    """One place in a text.

    Attributes:
        ids: the tokens up to there. text: the same, without a beginning-of-text token; "" where a tokenizer would make others of it.
        tokens: ids whose log-probabilities are known, and ``texts``, what each is alone. log_probs: of each curve, of each token.
    """

    ids: tuple[int, ...]
    text: str
    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    log_probs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Chat:
    """A conversation as the chat template renders it: its ``turns``, the ``text``, its ``ids``."""

    turns: tuple[Mapping[str, str], ...]
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """What ``probe.json`` says.

    Attributes:
        adapter: ``adapter_sha256`` of the files beside it. model: the base as it was named. dtype, packing: of the base while it was asked.
        template: SHA-256 of the chat template, "" for none. curves: the first is the base. questions: at least one. chats: may be empty.
    """

    adapter: str
    model: str
    dtype: str
    packing: str
    template: str
    curves: tuple[Curve, ...]
    questions: tuple[Question, ...]
    chats: tuple[Chat, ...] = ()

    def place(self, name: str) -> int:
        """Where a curve stands."""
        return next(at for at, curve in enumerate(self.curves) if curve.name == name)


def digest_of(folder: str | os.PathLike[str]) -> str:
    """``adapter_sha256`` of the files in a folder. Raises ``CheckpointError`` for one without an adapter."""
    return adapter_sha256(
        read_files(folder, {CONFIG_FILE: "the adapter's config", WEIGHTS_FILE: "the adapter's weights"})
    )


def write_probe(folder: str | os.PathLike[str], probe: Probe) -> None:
    """Write ``probe.json`` in one step. Raises ``WriteError``."""
    content = {"version": _VERSION, **dataclasses.asdict(probe)}
    write_file(Path(folder) / PROBE_FILE, json.dumps(content) + "\n")


def read_probe(folder: str | os.PathLike[str]) -> Probe:
    """The probe in an adapter's folder.

    Raises:
        CheckpointError: there is none, it is damaged, or it was made of another adapter than the one that lies there.
    """
    place = Path(folder)
    refuse_path(place)
    if not place.is_dir():
        raise CheckpointError(f"{place}: no such folder; wanted one of an adapter with its {PROBE_FILE}")
    path = place / PROBE_FILE
    if not path.exists():
        raise CheckpointError(f"{place}: holds no {PROBE_FILE}; make one with minilora seal {place}")
    raw = read_files(place, {PROBE_FILE: "what the adapter is verified by"})[PROBE_FILE]
    try:
        probe = _probe(parse_json(raw))
    except (ValueError, MiniLoraError) as error:
        raise CheckpointError(
            f"{path}: damaged, or of another minilora ({error}); make it anew with minilora seal"
        ) from None
    if (here := digest_of(place)) != probe.adapter:
        raise CheckpointError(
            f"{path}: was made of another adapter (sha256 {probe.adapter[:12]}, here is {here[:12]}); make it anew with minilora seal"
        )
    return probe


def _probe(content: dict[str, Any]) -> Probe:
    """Every field checked. Raises ``ConfigError`` in words."""
    if content.pop("version", None) != _VERSION:
        raise ConfigError(f"version: wanted {_VERSION}")
    found = _fields("probe", content, Probe)
    for name in ("adapter", "template"):
        if not isinstance(found[name], str) or not (
            _SHA256.fullmatch(found[name]) or (name == "template" and not found[name])
        ):
            raise ConfigError(f"{name}: wanted 64 hexadecimal digits")
    for name in ("model", "dtype", "packing"):
        validate.whole_text(name, found[name])
    curves = [_curve(entry) for entry in _list("curves", found["curves"], 2, _MOST_CURVES)]
    names = {curve.name for curve in curves}
    if not names >= {BASE, ADAPTED} or curves[0].name != BASE or len(names) < len(curves):
        raise ConfigError("curves: wanted base, adapted, and others by different names")
    questions = [_question(entry, curves) for entry in _list("questions", found["questions"], 1, _MOST_QUESTIONS)]
    chats = [_chat(entry) for entry in _list("chats", found["chats"], 0, _MOST_QUESTIONS)]
    return Probe(**found | {"curves": tuple(curves), "questions": tuple(questions), "chats": tuple(chats)})


def _curve(entry: Any) -> Curve:
    curve = Curve(**_fields("curves", entry, Curve))
    validate.text("curves.name", curve.name)
    if curve.kind not in _KINDS:
        raise ConfigError(f"curves.kind={validate.shown(curve.kind)}: wanted one of {', '.join(_KINDS)}")
    validate.number("curves.scale", curve.scale, 0, 1e3)
    validate.whole("curves.listed", curve.listed, 1, _MOST_TOKENS)
    return curve


def _question(entry: Any, curves: Sequence[Curve]) -> Question:
    found = _fields("questions", entry, Question)
    validate.whole_text("questions.text", found["text"])
    ids = _ids("questions.ids", found["ids"], _MOST_IDS)
    tokens = _ids("questions.tokens", found["tokens"], _MOST_TOKENS)
    texts = _list("questions.texts", found["texts"], len(tokens), len(tokens))
    validate.texts("questions.texts", texts)
    if len(set(tokens)) < len(tokens) or len(tokens) < max(curve.listed for curve in curves):
        raise ConfigError("questions.tokens: wanted different ones, as many as a curve lists")
    rows = _list("questions.log_probs", found["log_probs"], len(curves), len(curves))
    for row in rows:
        for value in _list("questions.log_probs", row, len(tokens), len(tokens)):
            validate.number("questions.log_probs", value, _LOWEST, 1e-3)
    return Question(ids, found["text"], tokens, tuple(texts), tuple(tuple(map(float, row)) for row in rows))


def _chat(entry: Any) -> Chat:
    found = _fields("chats", entry, Chat)
    turns = _list("chats.turns", found["turns"], 1, 16)
    for turn in turns:
        if not isinstance(turn, dict) or turn.keys() != {"role", "content"}:
            raise ConfigError("chats.turns: wanted role and content")
        validate.texts("chats.turns", list(turn.values()))
    validate.whole_text("chats.text", found["text"])
    return Chat(tuple(turns), found["text"], _ids("chats.ids", found["ids"], _MOST_IDS))


def _ids(name: str, value: Any, most: int) -> tuple[int, ...]:
    ids = _list(name, value, 1, most)
    for token in ids:
        validate.whole(name, token, 0, _LARGEST_ID)
    return tuple(ids)


def _list(name: str, value: Any, least: int, most: int) -> list[Any]:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise ConfigError(f"{name}: wanted a list of {least} to {most:,} entries")
    return value


def _fields(name: str, value: Any, kind: type) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != {entry.name for entry in dataclasses.fields(kind)}:
        raise ConfigError(
            f"{name}: wanted an object with {', '.join(entry.name for entry in dataclasses.fields(kind))}"
        )
    return dict(value)

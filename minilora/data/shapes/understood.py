"""A record of any shape as one of the three forms that are encoded, checked whole. Next file: ``data/records.py``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minilora.data.fields import ROLES, check_messages, check_options, check_text
from minilora.data.shapes.recognise import Shape, beside, columns_of, no_shape, shape_of
from minilora.data.shapes.record import Line, Record
from minilora.data.shapes.turns import as_turns, parsed
from minilora.errors import DataError

__all__ = ["Reading", "understood"]

APART = "\n\n"  # between what belongs together in one turn, and where no chat template parts question and answer


@dataclass(frozen=True)
class Reading:
    """How records are read.

    Args:
        columns: names of fields, ``prompt=question`` for each that is meant. system: a first turn for conversations that have none.
    """

    columns: Sequence[str] = ()
    system: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "_pairs", columns_of(self.columns))

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The columns taken apart."""
        return self._pairs  # type: ignore[attr-defined]


_PLAIN = Reading()


def understood(record: Record, reading: Reading = _PLAIN) -> Line:
    """The record in its form. Raises ``DataError`` for one that is of no shape, or holds what its shape has no use for."""
    said = frozenset([key for key, value in record.items() if value is not None])
    shape = shape_of(said, reading.pairs)
    if shape is None:
        raise no_shape(said, frozenset(record))
    for key in shape.rivals:
        _check_repeats(record, key, shape)
    line = (
        Line(record)
        if shape.own and not shape.rivals
        else Line({name: record[key] for name, key in shape.fields.items()})
    )
    line.shape, line.notes = shape.said, (*shape.notes, *shape.rivals)
    if shape.own and shape.fields.get("system", "system") != "system":
        line["system"] = record[shape.fields["system"]]
    if not shape.own and line.get("system") == "":  # a column that not all examples fill
        del line["system"]
    _FORMS[shape.form](line, shape)
    check_options(line)
    if reading.system and shape.form != "text" and not _has_system(line):
        line["system"] = reading.system
    return line


def _has_system(line: Line) -> bool:
    turns = line.get("messages") or ()
    return line.get("system") is not None or any(turn["role"] in ("system", "developer") for turn in turns)


# ---- forms


def _messages(line: Line, shape: Shape) -> None:
    key = shape.fields["messages"]
    turns = parsed(line["messages"], key)
    if not shape.own or _is_foreign(turns):
        turns = as_turns(turns, key)
        if shape.own:
            line.shape = "ShareGPT (messages)"
    line["messages"] = turns
    _parse_tools(line)
    check_messages(turns)


def _is_foreign(turns: Any) -> bool:
    """Whether turns are written as ShareGPT writes them."""
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict):
        return False
    role = turns[0].get("role")
    return ("from" in turns[0] and role is None) or (isinstance(role, str) and role in ("human", "gpt", "prompter"))


def _prompt(line: Line, shape: Shape) -> None:
    fields = shape.fields
    _parse_tools(line)
    sides = [
        parsed(line[name], fields[name]) if _may_be_turns(line[name]) else line[name]
        for name in ("prompt", "completion")
    ]
    if any(isinstance(side, list) for side in sides) and shape.own:
        _as_conversation(line, *sides)
        return
    for name in ("prompt", "completion"):
        check_text(line[name], fields[name])
    if "input" in line:
        _join_context(line, fields["input"])
    if "history" in line:
        _put_history(line)
    if not shape.own:
        line.apart = APART


def _may_be_turns(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("[{") and value.endswith("}]") and '"role"' in value


def _as_conversation(line: Line, prompt: Any, completion: Any) -> None:
    """Prompt and completion as lists of turns, as TRL has them: of these only the answers of the completion are learnt."""
    asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    answered = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    for turns, name in ((asked, "prompt"), (answered, "completion")):
        if not turns or not all(isinstance(turn, dict) and turn.get("role") in ROLES for turn in turns):
            raise DataError(
                f"{name} is a list and no list of turns; wanted text, or [{{'role': ..., 'content': ...}}, ...]"
            )
    asked = [{**turn, "train": False, "weight": None} if turn["role"] == "assistant" else turn for turn in asked]
    for name in ("prompt", "completion"):
        del line[name]
    line["messages"], line.shape = [*asked, *answered], "prompt and completion (turns)"
    check_messages(line["messages"])


def _join_context(line: Line, key: str) -> None:
    context = line.pop("input")
    if not isinstance(context, str):
        raise DataError(f"{key} is a {type(context).__name__}; wanted text")
    if context.strip():
        check_text(context, key)
        line["prompt"] = f"{line['prompt']}{APART}{context}"


def _put_history(line: Line) -> None:
    """Earlier exchanges, ``[[question, answer], ...]``, in front."""
    history = parsed(line.pop("history"), "history")
    pairs: list[Any] = history if isinstance(history, list) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError("'history' is no list of pairs; wanted [[question, answer], ...]")
    if not pairs:
        return
    texts = [*(text for pair in pairs for text in pair), line.pop("prompt"), line.pop("completion")]
    line["messages"] = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    check_messages(line["messages"])


def _text(line: Line, shape: Shape) -> None:
    check_text(line["text"], shape.fields["text"])


def _parse_tools(line: Line) -> None:
    for name in ("tools", "documents"):
        if name in line:
            line[name] = parsed(line[name], name)


_FORMS = {"messages": _messages, "prompt": _prompt, "text": _text}


# ---- two shapes in one record


def _check_repeats(record: Record, key: str, shape: Shape) -> None:
    """Raise ``DataError`` for a field of another shape, unless it says what the record's own fields say, and nothing else."""
    texts = [text.strip() for text in _texts_of(record, shape)]
    value = record[key].strip() if isinstance(record[key], str) else None
    if value is None or not (value in texts or (texts and all(text in value for text in texts if text))):
        raise beside(key, shape)


def _texts_of(record: Record, shape: Shape) -> Iterator[str]:
    for name, key in shape.fields.items():
        value = record[key]
        if isinstance(value, str):
            yield value
        elif name == "messages" and isinstance(value, list):
            for turn in value:
                if isinstance(turn, Mapping):
                    yield from (text for text in (turn.get("content"), turn.get("value")) if isinstance(text, str))

"""The shape of a record, told from the names of its fields: exactly one must fit. Next file: ``data/shapes/turns.py``.

Found once for each set of names, so a file of one shape pays for it once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from minilora.data.shapes.names import ANSWERS, CONTEXTS, QUESTIONS, SYSTEMS, TEXTS, TURNS
from minilora.errors import ConfigError, DataError, nearest

__all__ = ["OPTIONS", "Shape", "beside", "columns_of", "no_shape", "shape_of"]

OPTIONS = ("system", "tools", "documents", "chat_template_kwargs")  # what a chat template is given beside the turns
_USED = {
    "messages": {"messages", *OPTIONS},
    "prompt": {"prompt", "completion", *OPTIONS},
    "text": {"text"},
}
_KNOWN = set.union(*_USED.values())
# What means something elsewhere and nothing here: a run that passed over it would learn something else than its author meant.
_MEANT = {
    *("weight", "weights", "train", "label", "labels", "input_ids", "assistant_masks", "completion_mask", "chosen"),
    *("rejected", "functions", "function_call", "tool_calls", "image", "images", "video", "videos", "audio", "audios"),
    *("chat_template",),
}
_FIELDS = ("messages", "prompt", "input", "completion", "text", "system", "tools")  # what a column can be named as
_MOST_SAID = 200


@dataclass(frozen=True)
class Shape:
    """What a record is.

    Attributes:
        form: "messages", "prompt" or "text". said: for people. fields: name here to the key in the record. notes: keys that nothing uses.
        own: whether its keys are minilora's own, so that the record can be taken as it is. rivals: keys that may only repeat the others.
    """

    form: str
    said: str
    fields: Mapping[str, str]
    notes: tuple[str, ...] = ()
    own: bool = False
    rivals: tuple[str, ...] = ()


NAMED = "columns: "  # how the shape of a record begins whose fields were named


def columns_of(columns: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """``prompt=src`` taken apart. Raises ``ConfigError`` for what is no such pair."""
    found: dict[str, str] = {}
    for column in columns:
        name, _, key = column.partition("=")
        if name not in _FIELDS or not key or name in found:
            raise ConfigError(
                f"columns: {column[:_MOST_SAID]!r}; wanted each of {', '.join(_FIELDS)} once at most, as in prompt=src completion=tgt"
            )
        found[name] = key
    forms = [form for form in ("messages", "completion", "text") if form in found]
    if found and (len(forms) != 1 or ("completion" in found) != ("prompt" in found)):
        raise ConfigError(
            f"columns: {' '.join(columns)[:_MOST_SAID]}; wanted one of messages=..., text=..., or prompt=... with completion=..."
        )
    return tuple(found.items())


@lru_cache(maxsize=256)
def shape_of(said: frozenset[str], columns: tuple[tuple[str, str], ...] = ()) -> Shape | None:
    """The shape of a record with these keys, None if it has none.

    Args:
        said: keys whose value is not null. columns: as ``columns_of`` returns them; they hold where all are there.

    Raises:
        DataError: fields that could each be the answer, or a key that means something and would not be used.
    """
    if columns and {key for name, key in columns if name in ("messages", "prompt", "completion", "text")} <= said:
        return _named(said, dict(columns))
    whole = [*_own(said), *_turns(said)]
    whole += [*_pairs(said, bool(whole)), *_texts(said)]
    if not whole:
        return None
    shape, *others = whole
    mine = set(shape.fields.values())
    rest = said - mine
    rivals = {key for other in others for key in other.fields.values()} - mine
    rivals |= rest & (_KNOWN if shape.own else {"messages", "prompt", "completion", "text"})
    notes = sorted(rest - rivals)
    for key in notes:
        _check_key(key, shape)
    return replace(shape, notes=tuple(notes), rivals=tuple(sorted(rivals)))


def _named(said: frozenset[str], columns: Mapping[str, str]) -> Shape:
    fields = {name: key for name, key in columns.items() if key in said}
    form = "messages" if "messages" in fields else "text" if "text" in fields else "prompt"
    used = set(fields.values())
    if form != "text":
        for name in OPTIONS:
            if name in said - used and name not in columns:
                fields[name] = name
    shown = ", ".join(f"{key} as {name}" if key != name else name for name, key in columns.items() if key in said)
    return Shape(form, f"{NAMED}{shown}", fields, tuple(sorted(said - set(fields.values()))))


# ---- shapes that a set of keys has


def _own(said: frozenset[str]) -> Iterable[Shape]:
    if "messages" in said:
        yield Shape("messages", "conversations (messages)", _with_options(said, {"messages": "messages"}), own=True)
    if {"prompt", "completion"} <= said:
        fields = {"prompt": "prompt", "completion": "completion"}
        yield Shape("prompt", "prompt and completion", _with_options(said, fields), own=True)


def _turns(said: frozenset[str]) -> Iterable[Shape]:
    for key in _found(said, TURNS):
        said_as = f"ShareGPT ({key})" if key == "conversations" else f"conversations ({key})"
        yield Shape("messages", said_as, _with_options(said, {"messages": key}))


def _pairs(said: frozenset[str], beside: bool) -> Iterable[Shape]:
    """A question and an answer under whatever names. Of several that could be the one, none is chosen."""
    answers, questions = _found(said, ANSWERS), _found(said, QUESTIONS)
    if len(questions) > 1:
        questions = [key for key in questions if _plain(key) != "input"]
    if not answers or not questions or {"prompt", "completion"} <= said:
        return
    if len(answers) > 1 or len(questions) > 1:
        if not beside:
            raise _ambiguous(questions, answers)
        yield Shape("prompt", "", {key: key for key in (*questions, *answers)})
        return
    context = [key for key in _found(said, CONTEXTS) if key not in questions][:1]
    fields = {"prompt": questions[0], "completion": answers[0]} | ({"input": context[0]} if context else {})
    fields = _with_options(said, fields) | ({"history": "history"} if "history" in said else {})
    names = ", ".join(fields[name] for name in ("system", "history", "prompt", "input", "completion") if name in fields)
    shown = f"Alpaca ({names})" if _plain(questions[0]) == "instruction" else names
    yield Shape("prompt", f"{shown} as {'turns' if 'history' in fields else 'one turn each'}", fields)


def _texts(said: frozenset[str]) -> Iterable[Shape]:
    if "text" in said:
        yield Shape("text", "text", {"text": "text"}, own=True)
    elif not said & {"role", "messages"}:
        yield from (Shape("text", f"text ({key})", {"text": key}) for key in _found(said, TEXTS[1:]))


def _with_options(said: frozenset[str], fields: dict[str, str]) -> dict[str, str]:
    """The same with the options of the chat template that the record has. ``system`` has other names."""
    found = dict(zip(("system",), _found(said, SYSTEMS), strict=False))
    return fields | found | {name: name for name in OPTIONS[1:] if name in said}


def _found(said: frozenset[str], names: Iterable[str]) -> list[str]:
    """The keys that are called so, whatever their case, in the order of the names."""
    if not (plain := _plain_of(said)):
        return []
    return [plain[name] for name in names if name in plain]


@lru_cache(maxsize=256)
def _plain_of(said: frozenset[str]) -> dict[str, str]:
    return {_plain(key): key for key in sorted(said, reverse=True) if len(key) < 30} | {key: key for key in said}


def _plain(key: str) -> str:
    return key.strip().lower().replace(" ", "_")


# ---- what is refused


def _ambiguous(questions: list[str], answers: list[str]) -> DataError:
    which, found = ("answer", answers) if len(answers) > 1 else ("question", questions)
    return DataError(
        f"holds {' and '.join(map(repr, found[:4]))}, which could each be the {which}; name the one that is meant: "
        f"--columns prompt={questions[0]} completion={answers[0]}"
    )


def no_shape(said: frozenset[str], present: frozenset[str]) -> DataError:
    """The error of a record that is of no shape; where it has half of one, of what is missing. ``present``: null values too."""
    if "completion" in said or "prompt" in said:
        absent = "completion" if "prompt" in said else "prompt"
        return DataError(
            f"{absent} is missing; wanted text"
            + (" (preference data is not for fine-tuning)" if "chosen" in said else "")
        )
    if own := next((form for form in _USED if form in present), None):
        if own == "messages":
            return DataError("'messages' is not a list with turns; wanted [{'role': 'user', 'content': ...}, ...]")
        return DataError(f"{own} is missing; wanted text")
    for half, other, some in ((QUESTIONS, "answer", ANSWERS), (ANSWERS, "question", QUESTIONS)):
        if found := _found(said, half):
            return DataError(
                f"has {found[0]!r} and no {other} beside it ({_keys(said)}); wanted one called {', '.join(some[:5])}, or --columns "
                "prompt=... completion=..."
            )
    return DataError(
        f"has the keys {_keys(present)}; wanted 'messages', 'prompt' and 'completion', or 'text' (or say which are meant: --columns "
        "prompt=... completion=...)"
    )


def _keys(keys: Iterable[str]) -> str:
    return str(sorted(keys)[:50])[:_MOST_SAID]


def _check_key(key: str, shape: Shape) -> None:
    if key in _MEANT:
        raise beside(key, shape)
    known = _KNOWN if shape.own else {*shape.fields.values(), *OPTIONS}
    if len(key) > 3 and any(key.lower().rstrip("s") == name.rstrip("s") for name in known):
        raise DataError(f"{key!r} is not used; is {nearest(key, known, 1)} meant? Rename it, or remove it")


def beside(key: str, shape: Shape) -> DataError:
    """The error of a key that has no part in a shape."""
    used = ", ".join(sorted(_USED[shape.form] if shape.own else shape.fields.values()))
    way = " ".join(f"{name}={shape.fields[name]}" for name in _FIELDS[:5] if name in shape.fields)
    return DataError(
        f"{key!r} is not used beside {shape.fields[shape.form]!r}, used are {used}; remove it, or have it passed over: --columns {way}"
    )

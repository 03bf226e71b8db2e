"""What the fields of a record may hold, and the conversation that they make.

Of a turn: ``role``, ``content``, ``tool_calls``, and ``weight`` (0 or 1) or ``train`` (true or false), which say whether an answer is
learnt. Beside the turns: ``system`` (a first turn of that role), ``tools``, ``documents``, ``chat_template_kwargs``. Whatever else a turn
holds is for the chat template; ``chat/used.py`` refuses what the template does not read. Next file: ``data/chat/template.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from minilora.errors import DataError

__all__ = ["Conversation", "check_messages", "check_options", "check_text", "conversation"]

_HALF = re.compile("[\ud800-\udfff]")
ROLES = ("system", "user", "assistant", "developer", "tool")
_OURS = ("weight", "train")  # read here and not given to the template
# Parameters of ``apply_chat_template``: as chat_template_kwargs they would mean something else than a variable of the template.
_TAKEN = {
    *(
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "tokenize",
        "padding",
    ),
    *("continue_final_message", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens"),
}


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given: ``turns`` up to the last answer, and ``options``; and which turns are answers to learn."""

    turns: list[dict[str, Any]]
    learnt: list[bool]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def answers(self) -> list[int]:
        """Places of the assistant's turns."""
        return [at for at, turn in enumerate(self.turns) if turn["role"] == "assistant"]


def conversation(record: Mapping[str, Any], arguments_as_text: bool = False) -> Conversation:
    """The conversation of a record with ``messages``, or of ``prompt`` and ``completion`` as one exchange.

    Arguments of a tool call may be given as an object or as its text in JSON; most templates want the object, some the text.
    """
    turns = record.get("messages")
    if turns is None:
        turns = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
    if record.get("system") is not None:
        turns = [{"role": "system", "content": record["system"]}, *turns]
    last = max(at for at, turn in enumerate(turns) if turn["role"] == "assistant")
    turns = turns[: last + 1]
    named = {name: record.get(name) for name in ("tools", "documents")}
    options = {name: value for name, value in named.items() if value} | (record.get("chat_template_kwargs") or {})
    given = [_given(turn, arguments_as_text) for turn in turns]
    return Conversation(given, [_is_learnt(turn) for turn in turns], options)


def _given(turn: Mapping[str, Any], arguments_as_text: bool) -> dict[str, Any]:
    given = {name: value for name, value in turn.items() if name not in _OURS and value is not None}
    if given.get("tool_calls"):
        given["tool_calls"] = [_called(call, arguments_as_text) for call in given["tool_calls"]]
    return given


def _called(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _called(call["function"], as_text)}
    arguments = call.get("arguments")
    if isinstance(arguments, str) and not as_text:
        with suppress(ValueError, RecursionError):
            parsed = json.loads(arguments)
            arguments = parsed if isinstance(parsed, dict) else arguments
    elif isinstance(arguments, dict) and as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "arguments": arguments} if arguments is not None else dict(call)


def _is_learnt(turn: Mapping[str, Any]) -> bool:
    return turn["role"] == "assistant" and turn.get("weight") != 0 and turn.get("train") is not False


def check_text(value: object, name: str) -> None:
    """Raise ``DataError`` for what is no text, blank, or holds half a character."""
    if not isinstance(value, str) or not value.strip():
        found = "missing" if value is None else "empty" if isinstance(value, str) else f"a {type(value).__name__}"
        raise DataError(f"{name} is {found}; wanted text")
    _check_letters(value, name)


def _check_letters(value: object, name: str) -> None:
    """The same for every text inside a value."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, (list, dict)):
            left += [*value, *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, str) and not value.isascii() and _HALF.search(value):
            raise DataError(f"{name} holds half of a surrogate pair, which is no character; write the file as UTF-8")


def check_messages(messages: object) -> None:
    """Raise ``DataError`` for what is no conversation that can be learnt from."""
    if not isinstance(messages, list) or not messages:
        raise DataError("'messages' is not a list with turns; wanted [{'role': 'user', 'content': ...}, ...]")
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise DataError(f"a turn has no role of {', '.join(ROLES)}; give every turn 'role' and 'content'")
        _check_turn(turn)
    if messages[0]["role"] == "assistant":
        raise DataError("the conversation begins with the assistant; put what was asked before it")
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    if not answers:
        raise DataError("no assistant turn, so there is nothing to learn; add the answer")
    if not any(map(_is_learnt, answers)):
        raise DataError(
            "no answer counts (weight 0 or train false in each), so there is nothing to learn; leave it out"
        )


def _check_turn(turn: Mapping[str, Any]) -> None:
    role, content, calls = turn["role"], turn.get("content"), turn.get("tool_calls")
    if calls is not None:
        _check_calls(calls, role)
    if not (role == "assistant" and calls and content in (None, "")) and not (role == "tool" and content == ""):
        check_text(content, f"content of a {role} turn")
    _check_letters({name: value for name, value in turn.items() if name != "content"}, f"a {role} turn")
    weight, train = turn.get("weight"), turn.get("train")
    if weight is not None and weight not in (0, 1):
        raise DataError(f"weight of a {role} turn is {str(weight)[:40]!r}; wanted 0 or 1")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"train of a {role} turn is {str(train)[:40]!r}; wanted true or false")
    if weight is not None and train is not None and bool(weight) != train:
        raise DataError(f"a {role} turn has weight {weight} and train {str(train).lower()}; wanted one of them")
    if role != "assistant" and (weight or train):
        raise DataError(f"a {role} turn is marked to be learnt, and only answers are; leave out its weight and train")


def _check_calls(calls: object, role: str) -> None:
    if role != "assistant":
        raise DataError(f"a {role} turn has tool_calls; wanted them in an assistant turn")
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError("tool_calls is no list of {'function': {'name': ..., 'arguments': {...}}}; wanted one")
        if not isinstance(function.get("arguments", {}), (dict, str)):
            raise DataError(f"arguments of the call of {function['name'][:40]!r} are no object; wanted {{...}}")


def check_options(record: Mapping[str, Any]) -> None:
    """Raise ``DataError`` for ``system``, ``tools``, ``documents`` or ``chat_template_kwargs`` that are not of their kind."""
    if record.get("system") is not None:
        check_text(record["system"], "system")
        if any(turn["role"] == "system" for turn in record.get("messages") or ()):
            raise DataError("'system' is given beside a system turn; wanted one of them")
    for name in ("tools", "documents"):
        value = record.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(each, dict) for each in value)):
            raise DataError(f"{name!r} is no list of objects; wanted [{{...}}, ...]")
        _check_letters(value, name)
    extra = record.get("chat_template_kwargs")
    if extra is not None and not isinstance(extra, dict):
        raise DataError("'chat_template_kwargs' is no object; wanted {'enable_thinking': false}, for example")
    if taken := sorted(_TAKEN & set(extra or ())):
        raise DataError(f"chat_template_kwargs has {taken[0]!r}, which is not a variable of the template; remove it")
    _check_letters(extra, "chat_template_kwargs")

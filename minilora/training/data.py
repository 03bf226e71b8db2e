"""Training data: JSONL read and checked whole before anything trains, encoded so that only the completion counts.

A line is one of ``{"messages": [{"role", "content"}, ...]}``, ``{"prompt", "completion"}`` or ``{"text"}``. Conversations go through the
model's own chat template; the loss is taken on the assistant's words and the end token after them, never on what was asked. Everything
is encoded before training, and no worker process draws anything: which examples a step sees is a function of (seed, step), so it can be
found again at any step. Next file: ``training/losses.py``.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.errors import DataError

__all__ = ["IGNORED", "Encoded", "collate", "encode", "encode_all", "micro_batches", "read_jsonl", "split"]

IGNORED = -100  # label of a token that does not count
LONGEST_LINE = 16_000_000  # bytes; some four million tokens, more than any context
_ROLES = ("system", "user", "assistant")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """One example: token ids, and labels of the same length with ``IGNORED`` where nothing is to be learnt.

    ``where`` is the file and line that it comes from, if it does, for messages.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    truncated: bool = False
    where: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if len(self.input_ids) != len(self.labels):
            raise DataError(
                f"{self.where or 'example'}: {len(self.input_ids)} tokens and {len(self.labels)} labels; wanted one label a token"
            )

    @property
    def supervised(self) -> int:
        """Tokens that count in the loss (the first token of a sequence is never predicted)."""
        return sum(label != IGNORED for label in self.labels[1:])


def read_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """All records of a file, every line checked.

    Raises:
        DataError: no file, no record, a line that is longer than 16 MB, not UTF-8, not JSON, or has none of the three forms; with
            path and line, and the byte of the line where there is one.
    """
    source = Path(path)
    if not source.is_file():
        raise DataError(
            f"{source}: no such file; wanted JSONL with 'messages', 'prompt' and 'completion', or 'text' in every line"
        )
    records: list[Record] = []
    try:
        with source.open("rb") as lines:
            for number, raw in enumerate(iter(lambda: lines.readline(LONGEST_LINE + 1), b""), 1):
                if number == 1:
                    raw = raw.removeprefix(codecs.BOM_UTF8)
                if raw.strip():
                    records.append(_record(raw, f"{source}:{number}"))
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror}); check the path and its rights") from None
    if not records:
        raise DataError(f"{source}: holds no example; wanted one JSON object a line")
    return records


class _Line(dict[str, Any]):
    """A record that knows where it was read."""

    where = ""


def _record(raw: bytes, where: str) -> Record:
    if len(raw) > LONGEST_LINE:
        raise DataError(
            f"{where}: is longer than {LONGEST_LINE:,} bytes; write one example a line, and cut it into shorter ones"
        )
    try:
        text = raw.decode("utf-8")
        record = json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}:{error.start + 1}: byte {error.start + 1} is not UTF-8; convert the file (iconv -t utf-8)"
        ) from None
    except json.JSONDecodeError as error:
        byte = len(text[: error.pos].encode()) + 1
        raise DataError(
            f"{where}:{byte}: not JSON at column {error.colno} ({error.msg}); write one object a line"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise DataError(f"{where}: cannot be read as JSON ({error}); write one plain object a line") from None
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: holds a {type(record).__name__}; wanted an object with 'messages', 'prompt' or 'text'"
        )
    if "messages" in record:
        _check_messages(record["messages"], where)
    elif "prompt" in record or "completion" in record:
        for name in ("prompt", "completion"):
            _check_text(record.get(name), name, where)
    elif "text" in record:
        _check_text(record["text"], "text", where)
    else:
        raise DataError(
            f"{where}: has the keys {str(sorted(record))[:200]}; wanted 'messages', 'prompt' and 'completion', or 'text'"
        )
    line = _Line(record)
    line.where = where
    return line


def _check_messages(messages: object, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: 'messages' is not a list with turns; wanted [{{'role': 'user', 'content': ...}}, ...]"
        )
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in _ROLES:
            raise DataError(f"{where}: a turn has no role of {', '.join(_ROLES)}; give every turn 'role' and 'content'")
        _check_text(turn.get("content"), f"content of a {turn['role']} turn", where)
    if messages[0]["role"] == "assistant":
        raise DataError(f"{where}: the conversation begins with the assistant; put what was asked before it")
    if not any(turn["role"] == "assistant" for turn in messages):
        raise DataError(f"{where}: no assistant turn, so there is nothing to learn; add the answer")


def _check_text(value: object, name: str, where: str) -> None:
    if not isinstance(value, str) or not value.strip():
        found = "missing" if value is None else "empty" if isinstance(value, str) else f"a {type(value).__name__}"
        raise DataError(f"{where}: {name} is {found}; wanted text")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(
            f"{where}: {name} holds half of a surrogate pair, which is no character; write the file as UTF-8"
        )


def encode(record: Record, tokenizer: Any, max_length: int) -> Encoded:
    """Token ids and labels of one record; what is longer than ``max_length`` loses its end (``truncated`` says so).

    Args:
        record: as ``read_jsonl`` returns it.
        tokenizer: of the model; conversations need its chat template.
        max_length: in tokens.

    Raises:
        DataError: a conversation, and the tokenizer has no chat template.
    """
    where = getattr(record, "where", "")
    ids: list[int] = []
    labels: list[int] = []
    try:
        for text, counts in _segments(record, tokenizer):
            piece = tokenizer(text, add_special_tokens=False).input_ids
            ids += piece
            labels += piece if counts else [IGNORED] * len(piece)
    except DataError as error:
        raise DataError(f"{where}: {error}" if where else str(error)) from None
    return Encoded(tuple(ids[:max_length]), tuple(labels[:max_length]), truncated=len(ids) > max_length, where=where)


def _segments(record: Record, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The record's text in pieces, each with whether it counts in the loss."""
    end = tokenizer.eos_token or ""
    messages = record.get("messages")
    if messages is None and "prompt" not in record:
        yield (tokenizer.bos_token or "") + record["text"] + end, True
        return
    if messages is None:
        if not tokenizer.chat_template:
            yield (tokenizer.bos_token or "") + record["prompt"], False
            yield record["completion"] + end, True
            return
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template; use an instruct model, or 'prompt' and 'completion' instead of 'messages'"
        )
    yield from _turns(messages, tokenizer, end)


def _turns(messages: Sequence[Mapping[str, str]], tokenizer: Any, end: str) -> Iterator[tuple[str, bool]]:
    """A conversation as (asked, answered, asked, answered ...): an answer counts up to and with its end token."""
    done = ""
    for index, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (whole.startswith(asked) and asked.startswith(done)):
            raise DataError(
                "the chat template rewrites earlier turns as a conversation grows; train on one turn a line instead"
            )
        yield asked[len(done) :], False
        answer = whole[len(asked) :]
        cut = answer.rfind(end) + len(end) if end and end in answer else len(answer)
        yield answer[:cut], True
        done = asked + answer[:cut]


def encode_all(records: Sequence[Record], tokenizer: Any, max_length: int) -> list[Encoded]:
    """Every record encoded; those that ``max_length`` leaves without a token to learn are left out.

    Raises:
        DataError: nothing is left to learn from.
    """
    encoded = [encode(record, tokenizer, max_length) for record in records]
    useful = [example for example in encoded if example.supervised]
    if not useful:
        raise DataError(
            f"none of {len(encoded)} examples has a token to learn within max_length={max_length}; raise it or shorten the prompts"
        )
    return useful


def split(records: Sequence[Record], share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """``(training, evaluation)``: a random ``share`` in [0, 1) of the records, at least one if ``share`` > 0, is held out."""
    held = min(len(records) - 1, max(1, round(share * len(records)))) if share > 0 else 0
    order = torch.randperm(len(records), generator=torch.Generator("cpu").manual_seed(seed), device="cpu").tolist()
    return [records[i] for i in sorted(order[held:])], [records[i] for i in sorted(order[:held])]


def micro_batches(examples: Sequence[Encoded], batch_size: int, seed: int, start: int = 0) -> Iterator[list[Encoded]]:
    """Batches of exactly ``batch_size`` without end: one epoch after the other, each in its own order, cut wherever a batch is full.

    So every example comes once an epoch, and none is dropped; a batch over the end of an epoch takes the rest from the next one, and
    one larger than the set holds some examples more than once. ``start`` skips as many batches without drawing them.
    """
    count, at = len(examples), start * batch_size
    epoch, order = -1, []
    while True:
        batch = []
        for place in range(at, at + batch_size):
            if place // count != epoch:
                epoch = place // count
                order = _epoch_order(count, seed, epoch)
            batch.append(examples[order[place % count]])
        yield batch
        at += batch_size


def _epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator, device="cpu").tolist()


def collate(batch: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """``input_ids``, ``labels`` and ``attention_mask``, int64 ``[batch, longest]``, padded on the right."""
    longest = max(len(example.input_ids) for example in batch)

    def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])

    return {
        "input_ids": padded([example.input_ids for example in batch], pad_id),
        "labels": padded([example.labels for example in batch], IGNORED),
        "attention_mask": padded([[1] * len(example.input_ids) for example in batch], 0),
    }

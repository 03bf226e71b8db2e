"""What is longer than ``max_length``: a text in pieces, a conversation between its turns, a long answer in windows. Nothing is lost.

The rule: a text is cut every ``max_length`` tokens, and each piece begins with the last token of the one before, so that every token is
learnt once. A conversation is parted into as few examples as hold whole exchanges (what was asked, its answers, and calls of tools between
them), with the system turn in front of each. What is too long for that, a single exchange, is read through windows that hold every token
of its answers once: the first with what was asked before it, and the last filled up with what stands before, so that a short answer to a
long prompt keeps the end of the prompt. Next file: ``data/encoding.py``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from minilora.data.shapes.record import Line, Record
from minilora.data.tokens import IGNORED

__all__ = ["Ids", "examples_in", "groups", "part_of", "pieces", "units", "windows"]

Ids = tuple[list[int], list[int]]  # token ids and labels
Turns = list[Any]
_HEADS = ("system", "developer")


def examples_in(labels: list[int], most: int, is_text: bool, truncate: bool) -> list[tuple[int, list[int]]]:
    """Where each example of a text begins in it, and its labels, one a token. ``truncate`` leaves one, without its end."""
    if truncate or len(labels) <= most:
        return [(0, labels[:most])]
    places = list(range(len(labels)))
    return [(own[0], learnt) for own, learnt in (pieces if is_text else windows)(places, labels, most)]


def pieces(ids: list[int], labels: list[int], most: int) -> list[Ids]:
    """A text in pieces of at most ``most`` tokens."""
    step = max(1, most - 1)
    starts = range(0, max(1, len(ids) - 1), step)
    return [(ids[at : at + most], labels[at : at + most]) for at in starts]


def windows(ids: list[int], labels: list[int], most: int) -> list[Ids]:
    """Windows of at most ``most`` tokens that hold each learnt token once; none where nothing is learnt."""
    learnt = [at for at, label in enumerate(labels) if label != IGNORED and at > 0]
    found: list[Ids] = []
    done = at = 0  # tokens before ``done``, and learnt ones before ``at``, stand in a window
    while at < len(learnt):
        first, end = learnt[at], learnt[-1] + 1
        if not found and first < most:
            start, stop = 0, min(len(ids), most)
        elif end - first < most:  # all that is left, with what stands before it
            start, stop = max(0, end - most), end
        else:
            start = first - (1 if found else most // 2)
            stop = start + most
        known = max(done, start) - start
        found.append((ids[start:stop], [IGNORED] * known + labels[start + known : stop]))
        done, at = stop, bisect_left(learnt, stop)
    return found


def units(record: Record) -> tuple[Turns, list[Turns]]:
    """The turns at the head of a conversation, which every part begins with, and its exchanges."""
    turns = list(record.get("messages") or ())
    last = max((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    turns = turns[: last + 1]
    head = next((at for at, turn in enumerate(turns) if turn["role"] not in _HEADS), 0)
    found: list[Turns] = []
    for at in range(head, len(turns)):
        answers = at > head and turns[at - 1]["role"] in ("assistant", "tool")
        if not found or (answers and turns[at]["role"] not in ("assistant", "tool")):
            found.append([])
        found[-1].append(turns[at])
    return turns[:head], found


def part_of(record: Record, head: Turns, some: Sequence[Turns]) -> Line:
    """A record that holds some exchanges of another one."""
    line = Line({**record, "messages": [*head, *(turn for unit in some for turn in unit)]})
    line.where, line.line = getattr(record, "where", ""), getattr(record, "line", 0)
    return line


def groups(lengths: Sequence[int], whole: int, most: int) -> list[tuple[int, int]]:
    """``[(first, end), ...]`` of exchanges that fit together, each as many as it can be.

    Args:
        lengths: tokens of each exchange behind the head. whole: tokens of all together, which have the head once.
    """
    head = max(0.0, (sum(lengths) - whole) / max(1, len(lengths) - 1))
    found, first, length = [], 0, 0.0
    for at, own in enumerate(lengths):
        if at > first and length + own - head > most + 0.5:
            found.append((first, at))
            first = at
        length = float(own) if at == first else length + own - head
    return [*found, (first, len(lengths))]

"""Texts by name, as bytes, from the Python that runs: prose, source code, and made lines that ask for memory or for a rule.

``docs`` is what the byte model was trained on, ``code`` what it is fine-tuned on. Each has a part that is held out, and one rule parts
them: the name of a topic or of a top-level module is held out if its CRC-32 leaves no remainder by HELD_OUT_OF. So the parts are the
same on every computer, and a module whose docstrings were not read is one whose code is not read. ``facts`` are random and can only be
learnt by heart, a known number of bits each; ``sums`` have one right answer, which a rule gives.
Next file: ``lab/byte_model/model.py``.
"""

from __future__ import annotations

import ast
import inspect
import os
import random
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from minilora.data.encoding import IGNORED, Encoded
from minilora.errors import DataError
from minilora.files.validate import whole

__all__ = ["FACT_BITS", "Line", "code", "decode", "docs", "encode", "facts", "line_examples", "sums", "text_examples"]

HELD_OUT_OF = 20  # one name in so many is held out
FACT_BITS = 32  # of the value of a fact: eight hexadecimal digits
# Tables of numbers, programs of their own, and texts that are no module's.
_LEFT_OUT = {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "this", "turtledemo"}
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # where a statement keeps others


class Line(NamedTuple):
    """A line of which the answer is learnt; it ends with a line end."""

    prompt: bytes
    answer: bytes


def docs(held_out: bool = False) -> bytes:
    """The topics of ``help()`` and the docstrings of the standard library, paragraph by paragraph; or the part that is held out.

    No paragraph stands twice, and none of the held-out part stands in the other: topics quote each other, and so do modules.

    Raises:
        DataError: this Python was installed without the source of its standard library.
    """
    return _docs(held_out)


def code(held_out: bool = False) -> bytes:
    """The source of the standard library with its comments, module after module, without its tests; or the part that is held out.

    Raises:
        DataError: as ``docs``.
    """
    return b"\n".join(source for name, source in _sources() if _is_held_out(name) == held_out)


def facts(count: int, seed: int) -> list[Line]:
    """Lines as ``kqzwe is 07fa93b1``: no key stands twice, and every value is ``FACT_BITS`` random bits, independent of all else.

    Args:
        count: 1 to a million.
        seed: another seed gives other facts. The first facts of a longer list are not those of a shorter one.

    Raises:
        ConfigError: ``count`` or ``seed`` is not a whole number in its range.
    """
    whole("count", count, 1, 10**6)
    whole("seed", seed, 0)
    draw = random.Random(seed)
    keys = draw.sample(range(26**5), count)
    values = [draw.getrandbits(FACT_BITS) for _ in keys]
    return [Line(_letters(key) + b" is ", b"%08x\n" % value) for key, value in zip(keys, values, strict=True)]


def sums(count: int, seed: int, held_out: bool = False) -> list[Line]:
    """Lines as ``47+85=132`` of two numbers with two digits each; no line stands twice, and a held-out one never in the other part.

    Args:
        count: at most the 7,085 lines there are or, held out, 1,015, parted by the CRC-32 of what stands before ``=``.
        seed: another seed gives another choice, in another order.

    Raises:
        ConfigError: ``count`` or ``seed`` is not a whole number in its range.
    """
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    part = [pair for pair in pairs if (zlib.crc32(b"%d+%d" % pair) % 8 == 0) == held_out]
    whole("count", count, 1, len(part))
    whole("seed", seed, 0)
    return [Line(b"%d+%d=" % pair, b"%d\n" % sum(pair)) for pair in random.Random(seed).sample(part, count)]


def encode(text: str | bytes) -> list[int]:
    """The tokens of a text: the bytes of its UTF-8, each from 0 to 255."""
    return list(text.encode() if isinstance(text, str) else text)


def decode(ids: Iterable[int]) -> str:
    """The text of tokens; bytes that are no UTF-8 become U+FFFD, so what a model makes up can be shown.

    Raises:
        DataError: a token is not from 0 to 255.
    """
    tokens = [int(token) for token in ids]
    if odd := next((token for token in tokens if not 0 <= token < 256), None):
        raise DataError(f"token {odd}: is no byte; the byte model's tokens are from 0 to 255")
    return bytes(tokens).decode(errors="replace")


def text_examples(text: bytes, length: int = 128) -> list[Encoded]:
    """A text cut into examples of ``length`` tokens, a token a byte; every one is learnt, and a shorter end is left out.

    Raises:
        ConfigError: ``length`` is not a whole number from 2. DataError: the text is shorter.
    """
    whole("length", length, 2)
    if len(text) < length:
        raise DataError(
            f"the text has {len(text)} bytes and an example {length}; give a longer text or a smaller length"
        )
    cuts = (tuple(text[at : at + length]) for at in range(0, len(text) - length + 1, length))
    return [Encoded(ids, ids) for ids in cuts]


def line_examples(lines: Iterable[Line]) -> list[Encoded]:
    """One example a line, a token a byte, of which the answer and its line end are learnt."""
    return [
        Encoded(tuple(line.prompt + line.answer), (IGNORED,) * len(line.prompt) + tuple(line.answer)) for line in lines
    ]


# ---- the texts of this Python


def _is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % HELD_OUT_OF == 0


@cache
def _sources() -> Sequence[tuple[str, bytes]]:
    """``(top-level module, source)`` of every file of the standard library, in order."""
    home = Path(os.__file__).parent
    found = []
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        if name.startswith("_"):  # twins of public modules in Python, and names of one system
            continue
        files = [home / f"{name}.py", *sorted((home / name).rglob("*.py"))]
        own = [file for file in files if file.is_file() and not {"test", "tests"} & set(file.relative_to(home).parts)]
        found += [(name, file.read_bytes().replace(b"\r\n", b"\n")) for file in own]
    if not found:
        raise DataError(f"{home}: no source of the standard library; use a Python that was installed with it")
    return found


@cache
def _docs(held_out: bool) -> bytes:
    seen = set(map(_words, _paragraphs(held_out=True))) if not held_out else set()
    kept = []
    for paragraph in _paragraphs(held_out):
        if (words := _words(paragraph)) not in seen:
            seen.add(words)
            kept.append(paragraph)
    return "\n\n".join(kept).encode()


def _paragraphs(held_out: bool) -> Iterator[str]:
    """The paragraphs of one part: topics first, then modules."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if _is_held_out(name) == held_out:
            yield from _parted(topics[name])
    for name, source in _sources():
        if _is_held_out(name) == held_out:
            for docstring in _docstrings(source):
                yield from _parted(docstring)


def _parted(text: str) -> list[str]:
    return [part.strip("\n").rstrip() for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


def _docstrings(source: bytes) -> Iterator[str]:
    nodes: list[ast.AST] = [ast.parse(source)]
    for node in nodes:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
        # Statements hold definitions, and expressions none; most of a tree is expressions.
        nodes += [inner for field in _BLOCKS for inner in getattr(node, field, ())]


def _words(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _letters(number: int) -> bytes:
    """A number below 26**5 as five letters."""
    return bytes(97 + number // 26**place % 26 for place in range(5))

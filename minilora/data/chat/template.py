"""A chat template and what it makes of a conversation: the text, and the places in it that the model is to learn to write.

An answer is what stands between the prompt that the model is shown (the turns before, rendered with the generation prompt) and the end
token of its turn, which is learnt too; the newline after that token is nobody's. A template with ``{% generation %}`` says itself what its
answers are. Next file: ``data/chat/layout.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from minilora.data.chat.bounded import LONGEST, allow, bounded
from minilora.errors import DataError

__all__ = ["Marked", "Span", "Template", "asked", "shared_length"]

Span = tuple[int, int]  # letters of a text, the end not included
Turns = Sequence[Mapping[str, Any]]
# Noncharacters of Unicode, which no text holds: where a span begins and ends, and at which turn a loop of the template is.
_OPEN, _CLOSE, _TURN, _LOOP, _END = (chr(0xFDD0 + number) for number in range(5))
_MARKS = re.compile(f"([{_OPEN}{_CLOSE}]|{_TURN}\\d+{_LOOP}\\d+{_END})")
_GENERATION = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_ENDGENERATION = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
_FOR = re.compile(r"(\{%[-+]?\s*for\s+(\w+)\s+in\s(?:[^%'\"]|%(?!\})|'[^']*'|\"[^\"]*\")*?)([-+]?)%\}")


@dataclass(frozen=True)
class Marked:
    """A rendered text with what its marks said: ``spans`` of ``{% generation %}``; and for each loop of the template that went through
    turns, ``[(turn, place in the text where it came)]``."""

    text: str
    spans: list[Span]
    loops: list[list[tuple[int, int]]]


class Template:
    """The chat template of a tokenizer, with the options of one conversation (tools, documents, variables of the template)."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any], ends: Sequence[str]) -> None:
        self.tokenizer, self.options = tokenizer, dict(options)
        self.source = _attempt(lambda: tokenizer.get_chat_template(None, self.options.get("tools")))
        self.ends = tuple(ends)

    @property
    def says_itself(self) -> bool:
        """Whether the template marks its answers."""
        return _GENERATION.search(self.source) is not None

    def reads(self, name: str) -> bool:
        """Whether the template's source has this name in it."""
        return re.search(rf"\b{re.escape(name)}\b", self.source) is not None

    def text(self, turns: Turns, prompt: bool = False, source: str | None = None, without: str = "") -> str:
        """The turns rendered; ``prompt`` adds the generation prompt, ``without`` leaves an option out.

        Raises:
            DataError: the template raised something.
        """
        allow()
        chosen: dict[str, Any] = {"add_generation_prompt": prompt, "tokenize": False}
        chosen |= ({"chat_template": source} if source else {}) | ({without: None} if without else {})
        text = _attempt(lambda: self.tokenizer.apply_chat_template(list(turns), **{**self.options, **chosen}))
        if not isinstance(text, str) or len(text) > LONGEST:
            raise DataError(f"the chat template makes more than {LONGEST:,} letters of it; use another one")
        return text

    def ids(self, turns: Turns) -> list[int]:
        """What the tokenizer itself gives for the turns, rendered and tokenized in its one call. Raises ``DataError`` as ``text``."""
        allow()
        chosen = {"add_generation_prompt": False, "tokenize": True, "return_dict": False}
        ids = _attempt(lambda: self.tokenizer.apply_chat_template(list(turns), **{**self.options, **chosen}))
        return [int(token) for token in ids]

    def marked(self, turns: Turns, text: str) -> Marked | None:
        """What marks say of ``text``, which the turns make; None where the template does something that marks in it would change."""
        numbered = [{**turn, _TURN: f"{_TURN}{at}{_LOOP}"} for at, turn in enumerate(turns)]
        marked = _read_marks(self.text(numbered, source=_with_marks(self.source)))
        return marked if marked.text == text else None

    # ---- answers

    def shown(self, turns: Turns, text: str) -> tuple[str, int]:
        """The text that ends in the last turn, an answer, as the model sees it and goes on; and where the answer begins in it.

        That is ``text``, which the turns make, if it begins with the prompt for the answer. A template that renders what was asked
        otherwise once it is answered shows the model the prompt all the same.

        Raises:
            DataError: the prompt ends in something that the rendered answer does not go on from.
        """
        asked = self.text(turns[:-1], prompt=True)
        shared = shared_length(asked, text)
        if not asked[shared:].strip():
            return text, shared
        header = asked.removeprefix(self.text(turns[:-1]))
        found = (
            [place.end() for place in re.finditer(re.escape(header), text)]
            if header.strip() and header != asked
            else []
        )
        content = str(turns[-1].get("content") or "").strip()
        begins = [at for at in found if content in text[at:]] or found
        if not begins:
            raise DataError(
                f"the chat template's prompt for an answer ends in {asked[shared:][-40:]!r}, and the answer that it renders does not go "
                "on from there; give chat_template_kwargs with which they agree (enable_thinking, for one), or another template"
            )
        return asked + text[begins[-1] :], len(asked)

    def ends_at(self, text: str, begin: int, end: int) -> int:
        """Where an answer that begins at ``begin`` ends: after its end token, where it has one before ``end``."""
        answer = text[begin:end]
        if answer.rstrip().endswith(self.ends):
            return begin + len(answer.rstrip())
        eos = self.tokenizer.eos_token
        return begin + answer.rfind(eos) + len(eos) if eos and eos in answer else end

    def only_ends(self, text: str) -> bool:
        """Whether there is nothing but end tokens and space in a text."""
        return not self._ends.sub("", text).strip()

    def last_end(self, text: str, begin: int, end: int) -> int:
        """After the last end token in ``text[begin:end]``; ``begin`` if there is none."""
        return max((found.end() for found in self._ends.finditer(text, begin, end)), default=begin)

    @cached_property
    def _ends(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.ends, key=len, reverse=True))) or "(?!)")


def asked(tokenizer: Any, prompts: Sequence[str], system: str = "") -> list[str]:
    """Each prompt as a user's turn with the generation prompt after it, and the ``system`` turn before it if there is one.

    Rendered where a template that does not end is ended.

    Raises:
        DataError: the template failed, or refuses it.
    """
    template = Template(tokenizer, {}, ())
    before = [{"role": "system", "content": system}] if system else []
    return list(
        bounded(lambda prompt: template.text([*before, {"role": "user", "content": prompt}], prompt=True), prompts)
    )


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Letters (or tokens) that two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _attempt(work: Any) -> Any:
    """What a template raises, as one line; of the types of jinja2 only its own ``raise_exception`` speaks for itself."""
    try:
        return work()
    except (DataError, MemoryError):
        raise
    except Exception as error:
        kind = type(error).__name__
        said = " ".join("".join(letter if letter.isprintable() else " " for letter in str(error)).split())[:300]
        at = getattr(error, "lineno", None)
        line = f" in its line {at}" if isinstance(at, int) else ""
        if kind == "TemplateError":
            raise DataError(
                f"the chat template refuses this: {said}; change the conversation, or the template"
            ) from None
        raise DataError(
            f"the chat template fails{line} ({kind}: {said}); use another one, or the form it wants"
        ) from None


@lru_cache(maxsize=8)
def _with_marks(source: str) -> str:
    """The template, printing a mark where a span of its own begins and ends, and at each turn of a loop over turns."""

    def loop(found: re.Match[str]) -> str:
        number, name = next(numbers), found[2]
        mark = f'{{{{ {name}["{_TURN}"] and {name}["{_TURN}"] ~ "{number}{_END}" }}}}'
        # The tag that now comes last is a block's, as the loop's was: space around it is taken away as before.
        return f"{found[1]}%}}{mark}{{% set minilora_mark = 0 {found[3]}%}}"

    numbers = iter(range(len(source)))
    opened = f'{{%\\1 filter reverse|replace("", "{_CLOSE}", 1)|reverse|replace("", "{_OPEN}", 1) \\2%}}'
    source = _GENERATION.sub(opened, source)
    return _FOR.sub(loop, _ENDGENERATION.sub(r"{%\1 endfilter \2%}", source))


def _read_marks(text: str) -> Marked:
    pieces: list[str] = []
    at, opened, spans = 0, [], []
    loops: dict[int, list[tuple[int, int]]] = {}
    for piece in _MARKS.split(text):
        if piece == _OPEN:
            opened.append(at)
        elif piece == _CLOSE and opened:
            spans.append((opened.pop(), at))
        elif piece.startswith(_TURN) and piece.endswith(_END):
            turn, _, number = piece[1:-1].partition(_LOOP)
            loops.setdefault(int(number), []).append((int(turn), at))
        else:
            pieces.append(piece)
            at += len(piece)
    return Marked("".join(pieces), spans, [loops[number] for number in sorted(loops)])

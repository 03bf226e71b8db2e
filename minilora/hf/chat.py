"""A conversation with a model: its turns are remembered, its answers come word by word, and what no longer fits the context is dropped.

Next file: ``hf/generate.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from minilora.data.chat.bounded import bounded
from minilora.data.chat.template import Template
from minilora.errors import DataError
from minilora.training.guards import context_length

__all__ = ["Answer", "Chat"]

Around = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Answer:
    """One answer: its ``text``; whether it was ``stopped`` by Ctrl-C; how many pairs of turns were ``dropped`` before it."""

    text: str
    stopped: bool
    dropped: int


@dataclass
class Chat:
    """A conversation.

    Args:
        model: a causal language model. tokenizer: its own; without a chat template turns go in as plain lines.
        system: the system turn, "" for none. max_new_tokens: of an answer. temperature: 0 is greedy.
        around: makes a context in which the model answers, such as the one that turns its adapter off.
        turns: ``{role, content}``, oldest first, without the system turn.
    """

    model: Any
    tokenizer: Any
    system: str = ""
    max_new_tokens: int = 128
    temperature: float = 0.0
    around: Around = nullcontext
    turns: list[dict[str, str]] = field(default_factory=list)

    def beside(self, around: Around) -> Chat:
        """The same conversation so far, to be gone on with apart."""
        return replace(self, around=around, turns=[dict(turn) for turn in self.turns])

    def ask(self, question: str, write: Callable[[str], None], told: Callable[[int], None] | None = None) -> Answer:
        """Ask, and give the answer to ``write`` in pieces as it comes. Ctrl-C (``KeyboardInterrupt``) ends the answer where it is.

        Args:
            told: gets the number of pairs that are dropped, before the answer begins, if there are any.

        Raises:
            DataError: the question does not fit the context alone, or the chat template refuses it. The conversation is as it was.
        """
        turns, dropped = [*self.turns, {"role": "user", "content": question}], 0
        limit = context_length(self.model)
        ids = self._encoded(turns)
        while limit is not None and ids.shape[1] + self.max_new_tokens > limit and len(turns) > 2:
            turns, dropped = turns[2:], dropped + 1
            ids = self._encoded(turns)
        if limit is not None and ids.shape[1] >= limit:
            raise DataError(
                f"the question takes {ids.shape[1]:,} tokens, and the context of the model has {limit:,}; ask a shorter one"
            )
        if dropped and told:
            told(dropped)
        most = self.max_new_tokens if limit is None else min(self.max_new_tokens, limit - ids.shape[1])
        pieces, stopped = _Pieces(write), False
        try:
            self._generate(ids, most, pieces)
        except KeyboardInterrupt:
            stopped = True
        if pieces.text or not stopped:  # a question that got no word of an answer was not asked
            self.turns[:] = [*turns, {"role": "assistant", "content": pieces.text}]
        return Answer(pieces.text, stopped, dropped)

    def _encoded(self, turns: list[dict[str, str]]) -> torch.Tensor:
        """Token ids ``[1, tokens]`` of the conversation with the prompt for an answer."""
        before = [{"role": "system", "content": self.system}] if self.system else []
        if self.tokenizer.chat_template:
            template = Template(self.tokenizer, {}, ())
            (text,) = bounded(lambda said: template.text(said, prompt=True), [[*before, *turns]])
        else:
            text = "\n".join(turn["content"] for turn in [*before, *turns])
        special = not self.tokenizer.chat_template
        ids: torch.Tensor = self.tokenizer(text, add_special_tokens=special, return_tensors="pt")["input_ids"]
        return ids

    def _generate(self, ids: torch.Tensor, most: int, pieces: _Pieces) -> None:
        from transformers import TextStreamer

        # It decodes whole words, holds back what may still change, and prints unless it is told where to.
        streamer: Any = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = lambda text, stream_end=False: pieces.add(text)
        choice = {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        ids = ids.to(self.model.device)
        options = {"attention_mask": torch.ones_like(ids), "pad_token_id": self.tokenizer.pad_token_id, **choice}
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), self.around():
                self.model.generate(input_ids=ids, max_new_tokens=most, streamer=streamer, **options)
        finally:
            self.model.train(training)


class _Pieces:
    """What was written so far, from the first letter on; space at its end waits for a word that follows."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write, self.text, self._held = write, "", ""

    def add(self, piece: str) -> None:
        """Write one more piece."""
        whole = self._held + piece
        whole = whole if self.text else whole.lstrip()
        words = whole.rstrip()
        self._held = whole[len(words) :]
        if words:
            self.text += words
            self.write(words)

"""Make a probe: ask a model with its adapter a few questions, along every curve.

The prompts go in as one user turn through the chat template, where there is one, and as plain text. Each is gone on with by a few of the
adapted model's own words, and where base and adapted model differ most a question is asked: so a handful of short prompts tells much.
Next file: ``proof/verdict.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilora.data.chat.template import asked
from minilora.errors import DataError, MiniLoraError, StateError
from minilora.proof.curves import Way, applied, ways
from minilora.proof.probe import Chat, Probe, Question, digest_of, write_probe
from minilora.training.guards import context_length
from minilora.training.progress import busy

__all__ = ["GENERAL", "measure", "seal_folder"]

# What is asked where nobody says what to ask, or too little.
GENERAL = ("Who are you?", "How is the weather today?", "Tell me about your work.")
_CHATS, _ROWS = 2, 3  # prompts that are asked as chat, and all of them
_WORDS = 6  # tokens of the adapted model's answer
_EACH = 4  # questions of a prompt at the most
_LONGEST = 256  # tokens of a prompt
_DIGITS = 4  # of a log-probability


@dataclass
class _Row:
    """A prompt on its way: its tokens with the beginning of the answer, and where questions may be asked
    (a length of tokens each); ``prompt`` is its own length."""

    ids: list[int]
    places: list[int]
    prompt: int


def seal_folder(
    model: Any, tokenizer: Any, folder: str | os.PathLike[str], prompts: Sequence[str] = (), **more: Any
) -> Probe:
    """``measure`` the active adapter of a model, which lies in ``folder``, and write ``probe.json`` there; ``more`` as ``measure``."""
    probe = measure(model, tokenizer, prompts, adapter=digest_of(folder), **more)
    write_probe(folder, probe)
    return probe


@torch.no_grad()
def measure(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] = (),
    *,
    system: str = "",
    adapter: str = "",
    name: str = "",
    packing: str = "",
    template: str = "",
    say: Callable[[str], None] | None = None,
) -> Probe:
    """What base and adapted model say to a few prompts. The model is left as it was.

    Args:
        model: a causal language model of transformers with one active adapter. tokenizer: its own.
        prompts: the first are asked, two as chat and one as text; general ones follow where there are fewer. system: of a chat.
        adapter: ``adapter_sha256`` of its folder. name, packing, template: of the base as a run remembers it. say: gets a line.

    Raises:
        StateError: not exactly one adapter is active, or NaN is answered. DataError: no prompt fits the context, or the chat template
            refuses them all.
    """
    chosen, training = ways(model), model.training
    model.eval()
    try:
        chats = _chats(tokenizer, [*prompts, *GENERAL], system, context_length(model))
        texts = [ids for text in [*prompts, *GENERAL] if 2 <= len(ids := _plain(tokenizer, text)) <= _LONGEST]
        starts = [list(chat.ids) for chat in chats] + texts[: _ROWS - len(chats)]
        if not starts:
            raise DataError("prompts: none of them has 2 to 256 tokens; give a shorter one")
        with busy("asking for the probe", len(chosen)) as tick:
            rows = _gone_on(model, starts, tokenizer.eos_token_id, context_length(model))
            chosen, answers = _numbers([(way, _asked(model, way, rows, tick)) for way in chosen])
        questions = [
            question
            for at, row in enumerate(rows)
            for question in _questions(row, [answer[at] for answer in answers], chosen, tokenizer)
        ]
    finally:
        model.train(training)
    dtype = str(next(p for p in model.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
    base = name or str(getattr(model.config, "_name_or_path", ""))
    curves = tuple(way.curve for way in chosen)
    found = Probe(adapter, base, dtype, packing, template, curves, tuple(questions), tuple(chats))
    if say:
        from minilora.proof.verdict import told_effect

        say(told_effect(found))
    return found


def _chats(tokenizer: Any, prompts: Sequence[str], system: str, context: int | None) -> list[Chat]:
    """The first prompts as the chat template renders them, one user turn each; [] without a template."""
    if not tokenizer.chat_template:
        return []
    most = min(_LONGEST, (context or _LONGEST) - _WORDS)
    found: list[Chat] = []
    why: MiniLoraError | None = None
    before = [{"role": "system", "content": system}] if system else []
    for prompt in dict.fromkeys(prompts):
        try:
            (text,) = asked(tokenizer, [prompt], system)
        except MiniLoraError as error:
            why = error
            continue
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if 2 <= len(ids) <= most and len(found) < _CHATS:
            found.append(Chat((*before, {"role": "user", "content": prompt}), text, tuple(ids)))
    if not found and why is not None:
        raise why
    return found


def _plain(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _gone_on(model: Any, starts: Sequence[list[int]], end: int | None, context: int | None) -> list[_Row]:
    """Each prompt with the first words of the adapted model's greedy answer, up to its end token."""
    longest = max(map(len, starts))
    device = next(model.parameters()).device
    ids = torch.tensor([ids[:1] * (longest - len(ids)) + ids for ids in starts], device=device)
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in starts], device=device)
    words = min(_WORDS, (context or longest + _WORDS) - longest)
    out = ids
    if words > 0:
        choice: dict[str, Any] = {"do_sample": False, "max_new_tokens": words, "pad_token_id": ids[0, 0].item()}
        out = model.generate(input_ids=ids, attention_mask=mask, **choice)
    rows = []
    for start, new in zip(starts, out[:, longest:].tolist(), strict=True):
        said = new[: new.index(end)] if end in new else new
        places = range(len(start), len(start) + len(said) + 1)
        rows.append(_Row([*start, *said], list(places), len(start)))
    rows[-1].places.insert(0, max(1, rows[-1].prompt // 2))  # inside a text, too
    return rows


def _logits(model: Any, rows: Sequence[_Row]) -> list[Tensor]:
    """Logits ``[tokens, vocabulary]`` in fp32 after every token of each row, in one batch, padded on the right."""
    longest = max(len(row.ids) for row in rows)
    device = next(model.parameters()).device
    ids = torch.tensor([row.ids + row.ids[:1] * (longest - len(row.ids)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows], device=device)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return [logits[at, : len(row.ids)].float() for at, row in enumerate(rows)]


def _asked(model: Any, way: Way, rows: Sequence[_Row], tick: Callable[[], None]) -> list[Tensor]:
    """Log-probabilities ``[places, vocabulary]`` of each row along a curve."""
    tick()
    with applied(model, way):
        found = _logits(model, rows)
    return [
        torch.log_softmax(logits[[place - 1 for place in row.places]], -1).cpu()
        for row, logits in zip(rows, found, strict=True)
    ]


def _numbers(asked: Sequence[tuple[Way, list[Tensor]]]) -> tuple[list[Way], list[list[Tensor]]]:
    """The curves along which the model answers numbers; the base's and the adapted model's must be such."""
    found = [(way, answers) for way, answers in asked if not any(answer.isnan().any() for answer in answers)]
    for (way, _), whose in zip(asked, ("the base", "the adapted model"), strict=False):
        if way not in (other for other, _ in found):
            raise StateError(
                f"{whose} answers NaN, so nothing can be verified by it; minilora doctor looks for NaN in an adapter"
            )
    return [way for way, _ in found], [answers for _, answers in found]


def _questions(row: _Row, answers: Sequence[Tensor], chosen: Sequence[Way], tokenizer: Any) -> list[Question]:
    """The end of the prompt, and where base and adapted model differ most."""
    base, adapted = answers[0], answers[1]
    differ = ((base.exp() + adapted.exp()) / 2 * (adapted - base).square()).nan_to_num().sum(-1)
    order = sorted(range(len(row.places)), key=lambda at: -float(differ[at]))
    first = row.places.index(row.prompt)
    kept = sorted({first, *[at for at in order if at != first][: _EACH - 1]})
    return [_question(row.ids[: row.places[at]], [answer[at] for answer in answers], chosen, tokenizer) for at in kept]


def _question(ids: Sequence[int], rows: Sequence[Tensor], chosen: Sequence[Way], tokenizer: Any) -> Question:
    tokens: dict[int, None] = {}
    for way, row in zip(chosen, rows, strict=True):
        tokens |= dict.fromkeys(row.topk(min(way.curve.listed, len(row))).indices.tolist())
    known = list(tokens)
    table = tuple(tuple(round(max(float(value), -1e4), _DIGITS) for value in row[known]) for row in rows)
    texts = tuple(tokenizer.decode([token]) for token in known)
    return Question(tuple(ids), _text(ids, tokenizer), tuple(known), texts, table)


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    """The ids as text that a program makes the same ids of, which puts a beginning-of-text token before it itself; "" if there is none."""
    own = list(ids)
    if own and own[0] == tokenizer.bos_token_id and tokenizer("")["input_ids"][:1] == own[:1]:
        own = own[1:]
    text: str = tokenizer.decode(own)
    return text if tokenizer(text, add_special_tokens=False)["input_ids"] == own else ""

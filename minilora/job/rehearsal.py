"""A dry run: all that a job does up to its first step, told and not done. Next file: ``job/trackers.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, islice
from typing import Any

from minilora.data.batches import micro_batches
from minilora.data.encoding import Encoded
from minilora.data.tokens import IGNORED
from minilora.errors import StateError
from minilora.job.settings import Job
from minilora.measure.plan import as_rows, predict
from minilora.qlora.kbit import checkpoint_activations
from minilora.report.tables import as_text
from minilora.training.best import refuse_without_evaluations
from minilora.training.guards import check_examples, check_parameters
from minilora.training.losses import token_losses
from minilora.training.optim_choice import optimizer_of
from minilora.training.packed import choose_collate
from minilora.training.schedule import learning_rate

__all__ = ["rehearse"]

_SHOWN = 2  # examples of the first batch
_LONGEST = 300  # signs of a part of an example


def rehearse(
    job: Job,
    model: Any,
    tokenizer: Any,
    examples: Sequence[Encoded],
    evaluation: Sequence[Encoded],
    say: Callable[[str], None],
) -> None:
    """Say what the job would train on, step by step, in how much memory. The model has its adapter; nothing is written.

    Raises:
        MiniLoraError: what ``train`` would refuse before its first step, as it says it.
    """
    config, pad = job.training, tokenizer.pad_token_id
    named = check_parameters(model)
    check_examples(model, examples, pad)
    if evaluation:
        check_examples(model, evaluation, pad, "evaluation")
    refuse_without_evaluations(config, evaluation)
    optimizer_of(model, named, config)
    tensors = choose_collate(model, examples, config, pad, say)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    total, learnt = (sum(counts) for counts in zip(*map(_counts, examples), strict=True))
    say(f"tokens: {total:,} an epoch, of which {learnt:,} are learnt; {len(evaluation)} examples to evaluate on")
    rates = [learning_rate(config, step) for step in range(config.steps)]
    peak = rates.index(max(rates))
    say(
        f"learning rate: {rates[0]:.2g} in step 1, {rates[peak]:.2g} in step {peak + 1}, {rates[-1]:.2g} in step {config.steps} "
        f"({config.schedule})"
    )
    longest = sorted(examples, key=lambda example: len(example.input_ids))[-config.batch_size :]
    _say_memory(model, tensors(longest, pad), say)
    step = list(islice(micro_batches(examples, config.batch_size, config.seed), config.accumulate))
    first = step[0]
    rows, length = tensors(first, pad)["input_ids"].shape
    count, counted = (sum(counts) for counts in zip(*map(_counts, first), strict=True))
    say(
        f"first step: {len(step)} micro-batch{'es' * (len(step) > 1)}; the first has {len(first)} examples in {rows} rows of {length} "
        f"tokens: {count} tokens, {counted} learnt, {rows * length - count} padding"
    )
    for number, example in enumerate(first[:_SHOWN], 1):
        total, learnt = _counts(example)
        say(f"example {number} of {len(first)}, {total} tokens, {learnt} learnt:")
        for counts, text in _parts(example, tokenizer):
            say(f"  {'learnt ' if counts else 'read   '} {_short(text)!r}")


def _counts(example: Encoded) -> tuple[int, int]:
    return len(example.input_ids), example.supervised


def _parts(example: Encoded, tokenizer: Any) -> list[tuple[bool, str]]:
    """Neighbouring tokens that are learnt, or not learnt, together as text."""
    pairs = zip(example.labels, example.input_ids, strict=True)
    return [
        (learnt, tokenizer.decode([token for _, token in group]))
        for learnt, group in groupby(pairs, key=lambda pair: pair[0] != IGNORED)
    ]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def _say_memory(model: Any, batch: dict[str, Any], say: Callable[[str], None]) -> None:
    """The memory of a step with the longest examples, counted as a CPU computes it."""
    learnt = int((batch["labels"] != IGNORED).sum())
    try:
        found = predict(model, lambda paper: token_losses(paper, batch).sum() / learnt)
    except StateError as error:
        say(f"memory: not predicted: {error}")
        return
    columns, rows = as_rows(found)
    say(f"memory of a step with the longest examples:\n{as_text(columns, rows)}")

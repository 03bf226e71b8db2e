"""A dry run: all that a job does up to its first step, told and not done. Next file: ``job/trackers.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, islice
from typing import Any

import numpy as np

from minilora.data.batches import micro_batches
from minilora.data.encoding import Encoded
from minilora.data.examples import Examples
from minilora.data.tokens import IGNORED
from minilora.errors import StateError
from minilora.job.settings import Job
from minilora.measure.plan import as_rows, predict
from minilora.qlora.kbit import checkpoint_activations
from minilora.report.tables import as_text
from minilora.training.best import refuse_without_evaluations
from minilora.training.guards import check_examples, check_parameters
from minilora.training.losses import token_losses
from minilora.training.optim_choice import as_trained, optimizer_of
from minilora.training.packed import choose_collate
from minilora.training.probe import refuse_reading_ahead
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
    refuse_reading_ahead(model, examples, pad)
    with as_trained(model, config):
        optimizer_of(model, {name: p for name, p in named.items() if p.requires_grad}, config)
    tensors = choose_collate(model, examples, config, pad, say)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    total, learnt = _counts(examples)
    say(f"tokens: {total:,} an epoch, of which {learnt:,} are learnt; {len(evaluation)} examples to evaluate on")
    peak, last = min(config.steps_of("warmup"), config.steps), config.steps
    first, highest, least = (learning_rate(config, step - 1) for step in (1, peak, last))
    say(
        f"learning rate: {first:.2g} in step 1, {highest:.2g} in step {peak}, {least:.2g} in step {last} ({config.schedule})"
    )
    with as_trained(model, config):
        _say_memory(model, tensors(_longest(examples, config.batch_size), pad), say)
    step = list(islice(micro_batches(examples, config.batch_size, config.seed), config.accumulate))
    batch = step[0]
    rows, length = tensors(batch, pad)["input_ids"].shape
    total, learnt = _counts(batch)
    say(
        f"first step: {len(step)} micro-batch{'es' * (len(step) > 1)}; the first has {len(batch)} examples in {rows} rows of {length} "
        f"tokens: {total} tokens, {learnt} learnt, {rows * length - total} padding"
    )
    for number, example in enumerate(batch[:_SHOWN], 1):
        total, learnt = _counts([example])
        say(f"example {number} of {len(batch)}, {total} tokens, {learnt} learnt:")
        for counts, text in _parts(example, tokenizer):
            say(f"  {'learnt ' if counts else 'read   '} {_short(text)!r}")


def _counts(examples: Sequence[Encoded]) -> tuple[int, int]:
    """Tokens, and those of them that are learnt; of a table no token is read."""
    if isinstance(examples, Examples):
        return int(examples.rows["length"].sum()), int(examples.rows["supervised"].sum())
    return sum(len(one.input_ids) for one in examples), sum(one.supervised for one in examples)


def _longest(examples: Sequence[Encoded], count: int) -> list[Encoded]:
    """The longest examples, so many of them."""
    if isinstance(examples, Examples):
        return [examples[int(at)] for at in np.argsort(examples.rows["length"], kind="stable")[-count:]]
    return sorted(examples, key=lambda one: len(one.input_ids))[-count:]


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
    say("memory of a step with the longest examples:")
    for line in as_text(columns, rows).splitlines():
        say(f"  {line}")

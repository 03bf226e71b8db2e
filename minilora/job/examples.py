"""The examples of a job: read once, encoded, split into what is learnt from and what is held out; what is cut or left out is said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minilora.data.batches import split
from minilora.data.encoding import Encoded
from minilora.data.records import Source
from minilora.data.store import load_data
from minilora.hf.dates import date_of
from minilora.hf.smollm2 import cache_folder
from minilora.job.settings import Job

__all__ = ["encoded"]


def encoded(
    job: Job, source: Source, tokenizer: Any, context: int | None, say: Callable[[str], None]
) -> tuple[Sequence[Encoded], Sequence[Encoded]]:
    """Examples to learn from and to evaluate on, none longer than the model's context; what is cut or left out is counted and said."""
    length = min(job.max_length, context or job.max_length)
    if length < job.max_length:
        say(f"max_length={job.max_length} is more than the context of {job.model}: {length} tokens are the most")
    data = load_data(source, tokenizer, length, cache_folder(), date_of(tokenizer, job.date), say)
    if data.unused:
        say(f"not used: {', '.join(f'{key[:60]!r} of {count} lines' for key, count in data.unused.most_common(5))}")
    learn, held = split(range(len(data)), job.eval_share, job.training.seed)
    examples = data.of(learn)
    for line in data.tally(learn).remarks(length):
        say(line)
    evaluation: Sequence[Encoded] = data.of(held) if held else []
    cut = int(data.examples.table["truncated"].sum())
    if cut or data.left_out:
        say(
            f"max_length={length}: {cut} examples lose their end, {data.left_out} are left out because nothing to learn is left of them"
        )
    each, steps = job.training.batch_size * job.training.accumulate, job.training.for_examples(len(examples)).steps
    say(
        f"{len(examples)} to learn from, {each} a step: {steps} steps are {steps * each / max(1, len(examples)):.1f} epochs"
    )
    return examples, evaluation

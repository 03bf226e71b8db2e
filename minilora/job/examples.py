"""The examples of a job: its files looked at once, encoded, split into what is learnt from and what is held out; what is cut is said."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from minilora.data.batches import split
from minilora.data.encoding import Encoded
from minilora.data.examples import Examples
from minilora.data.records import Reading, Source, look_at_all
from minilora.data.shapes.recognise import NAMED
from minilora.data.sources.part import hash_of
from minilora.data.store import Data, Way, load_data
from minilora.errors import ConfigError
from minilora.hf.dates import date_of
from minilora.hf.smollm2 import cache_folder
from minilora.job.settings import Job

__all__ = ["Looked", "encoded", "looked_at", "parted", "way_of"]

_MOST_SAID = 3  # files, or shapes of one


@dataclass(frozen=True)
class Looked:
    """The files of a job as they were when they were looked at: ``learn`` to train on, ``held`` to evaluate on, if any are named."""

    learn: Sequence[Source]
    held: Sequence[Source]

    @property
    def sha256(self) -> str:
        """Of all of them. Of a single file it is the file's own."""
        every = [source.sha256 for source in (*self.learn, *self.held)]
        return every[0] if len(every) == 1 else hash_of(every)

    @property
    def said(self) -> str:
        """How many records, and where."""
        parts = []
        for sources, purpose in ((self.learn, ""), (self.held, " to evaluate on")):
            names = [source.name for source in sources]
            more = f" and {len(names) - _MOST_SAID} more" if len(names) > _MOST_SAID else ""
            if sources:
                count = sum(source.records for source in sources)
                parts.append(f"{count} examples{purpose} in {', '.join(names[:_MOST_SAID])}{more}")
        return ", ".join(parts)


def looked_at(job: Job, say: Callable[[str], None]) -> Looked:
    """The files of a job, each read once. Raises ``DataError`` for one that is missing, or holds no examples."""
    return Looked(look_at_all(job.data, say), look_at_all(job.eval_data, say, weighted=False))


def way_of(job: Job, tokenizer: Any, context: int | None) -> Way:
    """How the records of a job become examples, none longer than the model's context."""
    length = min(job.max_length, context or job.max_length)
    return Way(length, date_of(tokenizer, job.date), job.truncate, Reading(job.columns, job.system))


def encoded(
    job: Job, looked: Looked, tokenizer: Any, context: int | None, say: Callable[[str], None]
) -> tuple[Sequence[Encoded], Sequence[Encoded]]:
    """Examples to learn from and to evaluate on, none longer than the model's context; what is cut or left out is counted and said."""
    examples, evaluation = parted(job, looked, tokenizer, context, say)
    step, steps = job.training.batch_size * job.training.accumulate, job.training.for_examples(len(examples)).steps
    say(
        f"{len(examples)} to learn from, {step} a step: {steps} steps are {steps * step / max(1, len(examples)):.1f} epochs"
    )
    return examples, evaluation


def parted(
    job: Job, looked: Looked, tokenizer: Any, context: int | None, say: Callable[[str], None]
) -> tuple[Sequence[Encoded], Sequence[Encoded]]:
    """As ``encoded``, for who takes no steps."""
    way = way_of(job, tokenizer, context)
    length = way.max_length
    if length < job.max_length:
        say(f"max_length={job.max_length} is more than the context of {job.model}: {length} tokens are the most")
    each = [_loaded(source, tokenizer, way, say) for source in looked.learn]
    data = Data.together(each)
    if job.system and all(shape.partition(" ")[0] == "text" for shape in data.shapes):
        raise ConfigError(
            "system: the data holds texts, and no conversation that a system turn could begin; leave it out"
        )
    useful = np.flatnonzero(data.records["useful"]).tolist() or range(
        len(data)
    )  # nothing is held out of which nothing counts
    learn, held = split(useful, 0.0 if looked.held else job.eval_share, job.training.seed)
    examples = data.of(_weighted(learn, looked.learn, each, job.training.seed, say))
    _say_cut(data, learn, length, say)
    evaluation: Sequence[Encoded] = data.of(held) if held else []
    if looked.held:
        other = Data.together([_loaded(source, tokenizer, way, say) for source in looked.held])
        _say_cut(other, range(len(other)), length, say)
        evaluation = other.of(range(len(other)))
    if twins := _twins(examples, evaluation):
        say(f"{twins} of {len(evaluation)} examples to evaluate on are learnt from as well, so their loss is no test")
    if job.columns and not any(shape.startswith(NAMED) for shape in data.shapes):
        raise ConfigError(
            f"columns: no line has {' and '.join(column.partition('=')[2] for column in job.columns)[:200]}; look at the names of the "
            "fields, or leave it out"
        )
    return examples, evaluation


def _twins(learn: Examples, held: Sequence[Encoded]) -> int:
    """How many examples that are held out have the very tokens of one that is learnt from."""
    if not isinstance(held, Examples):
        return 0
    known, asked = ([bytes(row) for row in each.table["digest"][each.chosen]] for each in (learn, held))
    return sum(map(set(known).__contains__, asked))


def _loaded(source: Source, tokenizer: Any, way: Way, say: Callable[[str], None]) -> Data:
    """The data of a source; what its records were is said."""
    data = load_data(source, tokenizer, way, cache_folder(), say)
    found = data.shapes.most_common(_MOST_SAID)
    each = [f"{shape}: {count}" if len(data.shapes) > 1 else shape for shape, count in found]
    say(f"{source.name}: {'; '.join(each)}{' ...' if len(data.shapes) > len(found) else ''}")
    if data.unused:
        say(f"not used: {', '.join(f'{key[:60]!r} of {count} lines' for key, count in data.unused.most_common(5))}")
    return data


def _say_cut(data: Data, records: Sequence[int], length: int, say: Callable[[str], None]) -> None:
    """What was cut of some records, and what was left out."""
    for line in data.tally(records).remarks(length):
        say(line)
    lost = int(data.examples.table["truncated"].sum())
    if lost or data.left_out:
        say(
            f"max_length={length}: {lost} examples lose their end, {data.left_out} are left out because nothing to learn is left of them"
        )


def _weighted(
    learn: Sequence[int], sources: Sequence[Source], each: Sequence[Data], seed: int, say: Callable[[str], None]
) -> Sequence[int]:
    """The records to learn from, those of each source as often as its weight says: a half of them is drawn by the seed."""
    if all(source.weight == 1 for source in sources):
        return learn
    chosen: list[int] = []
    ends = [bisect_left(learn, end) for end in accumulate(map(len, each))]
    for number, (source, begin, end) in enumerate(zip(sources, [0, *ends], ends, strict=False)):
        own = learn[begin:end]
        times, share = divmod(source.weight, 1.0)
        generator = torch.Generator("cpu").manual_seed(seed + number)
        order = torch.randperm(len(own), generator=generator, device="cpu").tolist()
        some = order[: max(round(share * len(own)), int(times == 0 and bool(own)))] if share else []
        taken = [*list(own) * int(times), *(own[at] for at in some)]
        if source.weight != 1:
            say(f"{source.name}: weight {source.weight:g}: {len(taken)} examples an epoch, of {len(own)}")
        chosen += taken
    return chosen

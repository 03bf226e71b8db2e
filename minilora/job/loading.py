"""What a job has before anything is adapted: its examples, encoded for the model, and the model, packed on the way.

``fine_tune`` and a sweep come by this one road. ``prepare`` reads no weight, so what it refuses costs seconds. Next file: ``job/told.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minilora.data.encoding import Encoded
from minilora.hf.dates import date_of, dated
from minilora.hf.devices import Place
from minilora.hf.load import load_model, load_tokenizer, skeleton
from minilora.hf.places import packing
from minilora.job.examples import Looked, encoded
from minilora.job.sessions import template_sha256
from minilora.job.settings import Job
from minilora.lora.config import LoraConfig
from minilora.lora.match import Match, match
from minilora.training.guards import context_length
from minilora.training.progress import busy
from minilora.training.rows import Rows

__all__ = ["Prepared", "computing_with", "load", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """What a job knows before a weight is read.

    Attributes:
        paper: the model on meta tensors. matches: what each config selects of it. template: SHA-256 of the tokenizer's chat template.
        date: day that the template takes for today, "" if it asks for none. examples, evaluation: encoded.
    """

    paper: nn.Module
    matches: Sequence[Match]
    tokenizer: Any
    template: str
    date: str
    examples: Sequence[Encoded]
    evaluation: Sequence[Encoded]


def prepare(
    job: Job, place: Place, looked: Looked, configs: Sequence[LoraConfig], say: Callable[[str], None]
) -> Prepared:
    """Everything before the weights. Raises ``TargetError`` for a target of ``configs`` that the model has not, and as ``encoded``."""
    paper = skeleton(job.model, place.dtype, job.trust_remote_code)
    matches = [match(paper, config) for config in configs]  # a mistyped target shows now, before any weight is read
    say(f"{looked.said}; loading {job.model} on {place.said}")
    plain = load_tokenizer(job.model, job.trust_remote_code)
    template, tokenizer = template_sha256(plain), dated(plain, job.date)
    examples, evaluation = encoded(job, looked, tokenizer, context_length(paper), say)
    return Prepared(paper, matches, tokenizer, template, date_of(tokenizer, job.date), examples, evaluation)


def load(job: Job, place: Place, rows: Rows | None = None) -> Any:
    """The model in eval mode on its device, packed while it is read. ``rows``: as ``load_model``."""
    options: dict[str, Any] = {"device": place.device, "attention": job.attention, "rows": rows}
    options["quant"] = packing(job.quant, job.double_quant)
    with busy(f"loading {job.model}"):
        return load_model(job.model, place.dtype, job.trust_remote_code, **options)


@contextmanager
def computing_with(threads: int) -> Iterator[None]:
    """So many threads of torch until the end of the block; 0 leaves their number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)

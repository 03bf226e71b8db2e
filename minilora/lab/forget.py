"""What a trial has forgotten: how much worse its model is on a text of the user's own than the base was. Next file: ``lab/job.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from minilora.data.encoding import Encoded
from minilora.data.records import look_at_all
from minilora.job.examples import Looked, encoded
from minilora.job.settings import Job
from minilora.lab.trial import Result
from minilora.training.guards import check_examples, context_length
from minilora.training.losses import evaluate

__all__ = ["examples_of", "measure_on"]


def examples_of(job: Job, file: str, tokenizer: Any, paper: nn.Module, say: Callable[[str], None]) -> Sequence[Encoded]:
    """A file's examples as a job would learn from them. Raises as ``job.examples.encoded``."""
    own = replace(job, data=file, eval_data=(), eval_share=0.0, system="", columns=())
    looked = Looked(look_at_all(file, say, weighted=False), ())
    examples, _ = encoded(own, looked, tokenizer, context_length(paper), lambda line: None)
    say(f"{file}: {len(examples)} examples of text, on which it is measured what a trial has forgotten")
    return examples


def measure_on(
    model: nn.Module, examples: Sequence[Encoded], batch_size: int, pad_id: int
) -> Callable[[nn.Module, Result], Mapping[str, float]]:
    """What ``sweep`` takes as ``measure``; ``model`` is the bare base, whose loss is taken now."""
    check_examples(model, examples, pad_id, "text")
    base = evaluate(model, examples, batch_size, pad_id)

    def forgotten(adapted: nn.Module, result: Result) -> Mapping[str, float]:
        """``forgotten``: nats a token by which the loss on the text has risen, adapter on and off."""
        return {"forgotten": evaluate(adapted, examples, batch_size, pad_id) - base}

    return forgotten

"""What a trial has forgotten: how far its model has moved from the base on a text of the user's own. Next file: ``lab/jobs/job.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from minilora.data.encoding import Encoded
from minilora.data.records import look_at_all
from minilora.job.examples import Looked, encoded
from minilora.job.settings import Job
from minilora.lab.measures import forgetting
from minilora.lab.measures.divergence import divergence
from minilora.lab.sweeps.trial import Result
from minilora.lora.slots import adapters_of
from minilora.training.guards import check_examples, context_length

__all__ = ["examples_of", "measure_on"]


def examples_of(job: Job, file: str, tokenizer: Any, paper: nn.Module, say: Callable[[str], None]) -> Sequence[Encoded]:
    """A file's examples as a job would learn from them. Raises as ``job.examples.encoded``."""
    own = replace(job, data=file, eval_data=(), eval_share=0.0, system="", columns=())
    looked = Looked(look_at_all(file, say, weighted=False), ())
    examples, _ = encoded(own, looked, tokenizer, context_length(paper), lambda line: None)
    say(f"{file}: {len(examples)} examples of text, on which it is measured what a trial has forgotten")
    return examples


def measure_on(
    model: nn.Module, examples: Sequence[Encoded], pad_id: int
) -> Callable[[nn.Module, Result], Mapping[str, float]]:
    """What ``sweep`` takes as ``measure``: ``forgetting``, KL(base || trained) in nats a token; ``model`` is the bare base."""
    check_examples(model, examples, pad_id, "text")

    def measure(trained: nn.Module, result: Result) -> Mapping[str, float]:
        if result.trial.lora is None:
            return {"forgetting": _between(model, trained, examples)}
        return {"forgetting": forgetting(trained, examples, adapters_of(trained).active[0]).kl}

    return measure


@torch.no_grad()
def _between(base: Any, trained: Any, examples: Sequence[Encoded]) -> float:
    """As ``measures.forgetting``, of two models."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.input_ids], device=next(base.parameters()).device)
        was, now = (model(ids).logits[0, :-1] for model in (base, trained))
        total += float(divergence(was, now).sum(dtype=torch.float64))
        count += len(was)
    return total / count

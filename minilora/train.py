"""The training loop: AdamW on the adapter, linear warm-up and cosine decay, accumulation, clipping, evaluation, saves.

The loss is the mean over the supervised tokens of a whole step: with accumulation the micro-batches are weighted by their tokens, so that
cutting a batch in two changes nothing. Logits are computed only at supervised positions, which for short answers is most of the head's
work saved. Everything that happens is a line in ``log.jsonl``. Next file: ``report.py``.
"""

from __future__ import annotations

import inspect
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.checkpoint import save_adapter
from minilora.data import IGNORED, Encoded, collate, micro_batches
from minilora.errors import ConfigError, StateError
from minilora.io import append_line, write_file

__all__ = ["TrainConfig", "checkpoint_activations", "evaluate", "learning_rate", "memory_mb", "token_losses", "train"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: optimizer steps. batch_size: examples per micro-batch. accumulate: micro-batches per step.
        lr: peak learning rate; LoRA wants about ten times that of full fine-tuning. warmup: share of the steps in [0, 1) with rising rate.
        weight_decay: of AdamW. clip: largest gradient norm; 0 turns clipping off.
        seed: order of the data and of dropout. eval_every, save_every: steps between evaluations and saves; 0 never.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.

    Raises:
        ConfigError: a value that cannot be meant, by name.
    """

    steps: int = 60
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 0
    save_every: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "accumulate": 1, "seed": 0, "eval_every": 0, "save_every": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
                raise ConfigError(f"{name}={value!r}: wanted a whole number >= {smallest}")
        for name, low, high in (("lr", 0, 1), ("warmup", 0, 1), ("weight_decay", 0, 1), ("clip", 0, math.inf)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
                raise ConfigError(f"{name}={value!r}: wanted a number in [{low}, {high})")
        if self.lr == 0:
            raise ConfigError("lr=0: nothing would change; 1e-3 is usual for a small model, 2e-4 for a large one")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step ``step`` (from 0): linear up to ``lr`` over the warm-up, then half a cosine down to zero."""
    rise = max(1, round(config.warmup * config.steps))
    if step < rise:
        return config.lr * (step + 1) / rise
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, config.steps - rise)))


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy in nats of every supervised token of a batch, fp32 ``[tokens]``.

    Args:
        model: returns an object with ``logits [batch, length, vocabulary]``; is asked for the needed positions only if it can be
            (``logits_to_keep``, as transformers' models).
        batch: as ``collate`` makes it.
    """
    device = next(model.parameters()).device
    targets = batch["labels"][:, 1:].to(device)
    wanted = (targets != IGNORED).any(0).nonzero().squeeze(1)
    options: dict[str, Any] = {
        "input_ids": batch["input_ids"].to(device),
        "attention_mask": batch["attention_mask"].to(device),
    }
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        options["use_cache"] = False
    can_skip = "logits_to_keep" in accepted
    logits = model(**options, logits_to_keep=wanted).logits if can_skip else model(**options).logits[:, wanted]
    targets = targets[:, wanted]
    counts = targets != IGNORED
    return F.cross_entropy(logits[counts].float(), targets[counts], reduction="none")


@torch.no_grad()
def evaluate(model: nn.Module, examples: Sequence[Encoded], batch_size: int, pad_id: int) -> float:
    """Mean loss per supervised token in eval mode; the training mode is left as it was."""
    training = model.training
    model.eval()
    try:
        batches = [collate(examples[i : i + batch_size], pad_id) for i in range(0, len(examples), batch_size)]
        losses = torch.cat([token_losses(model, batch) for batch in batches])
    finally:
        model.train(training)
    return losses.mean().item()


def train(
    model: nn.Module,
    examples: Sequence[Encoded],
    config: TrainConfig,
    folder: Path,
    pad_id: int,
    evaluation: Sequence[Encoded] = (),
    sample: Callable[[], tuple[str, str]] | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train the parameters that require grad, in place; the finished adapter lies in ``folder``.

    Args:
        model: with adapters. examples, evaluation: encoded data. pad_id: padding token.
        folder: for ``log.jsonl``, the adapter at the end, and ``checkpoint-<step>/`` every ``save_every`` steps.
        sample: returns (prompt, answer), asked at every evaluation. watch: called with every record that is logged.

    Returns:
        The records. Per step: ``step, loss, lr, grad_norm, tokens, tokens_per_s, rss_mb, seconds``; per evaluation: ``step,
        eval_loss`` and the sample.

    Raises:
        StateError: nothing is trainable, or the loss stopped being finite (the last saved checkpoint stays).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise StateError(
            "no parameter requires grad, so nothing would train; inject an adapter, or load it with is_trainable=True"
        )
    write_file(folder / "log.jsonl", "")
    records: list[dict[str, Any]] = []

    def log(record: dict[str, Any]) -> None:
        records.append(record)
        append_line(folder / "log.jsonl", json.dumps(record))
        if watch:
            watch(record)

    def assess(step: int) -> None:
        record: dict[str, Any] = {"step": step, "eval_loss": evaluate(model, evaluation, config.batch_size, pad_id)}
        log(record | (dict(zip(("prompt", "answer"), sample(), strict=True)) if sample else {}))

    if config.gradient_checkpointing:
        checkpoint_activations(model)
    torch.manual_seed(config.seed)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    batches = micro_batches(examples, config.batch_size, config.seed)
    model.train()
    if evaluation:
        assess(0)
    begin = time.monotonic()
    for step in range(config.steps):
        rate = learning_rate(config, step)
        log(
            {"step": step + 1}
            | _step(
                model, optimizer, parameters, rate, list(islice(batches, config.accumulate)), config.clip, pad_id, begin
            )
        )
        if evaluation and (step + 1 == config.steps or (config.eval_every and (step + 1) % config.eval_every == 0)):
            assess(step + 1)
        if config.save_every and (step + 1) % config.save_every == 0:
            save_adapter(model, folder / f"checkpoint-{step + 1}")
    model.eval()
    save_adapter(model, folder)
    return records


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    rate: float,
    step_batches: Sequence[Sequence[Encoded]],
    clip: float,
    pad_id: int,
    begin: float,
) -> dict[str, Any]:
    """One optimizer step over its micro-batches; returns what is logged of it."""
    started = time.monotonic()
    supervised = sum(example.supervised for batch in step_batches for example in batch)
    total = 0.0
    for examples in step_batches:
        loss = token_losses(model, collate(examples, pad_id)).sum() / supervised
        loss.backward()
        total += loss.item()
    if not math.isfinite(total):
        raise StateError(f"the loss became {total} at learning rate {rate:g}; lower lr, or look for broken examples")
    norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    tokens, spent = (
        sum(len(example.input_ids) for batch in step_batches for example in batch),
        time.monotonic() - started,
    )
    return {
        "loss": total,
        "lr": rate,
        "grad_norm": float(norm),
        "tokens": tokens,
        "tokens_per_s": tokens / spent,
        "rss_mb": memory_mb(),
        "seconds": time.monotonic() - begin,
    }


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute activations in the backward pass. Raises ``StateError`` if the model has no such switch (transformers' models do)."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers from 5.24 on
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)  # type: ignore[operator]
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    else:
        raise StateError(
            f"{type(model).__name__} cannot checkpoint its activations; train without gradient_checkpointing"
        )


def memory_mb(peak: bool = False) -> float:
    """Memory of this process in MB (1e6 bytes): resident now, or its peak so far; of the GPU when one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e6
    if peak or not Path("/proc/self/statm").exists():
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6

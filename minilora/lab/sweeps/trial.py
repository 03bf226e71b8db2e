"""One fine-tuning of a sweep: what it is asked to do, and what came out.

The law of sweeps: a trial ends with the adapter that it would end with by itself, that is with

    torch.manual_seed(trial.train.seed)
    inject(model, trial.lora, variant=trial.variant)
    train(model, examples, trial.train, folder, pad_id)

Next file: ``lab/sweeps/together.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from minilora.errors import ConfigError
from minilora.job.settings import FROM_DATA
from minilora.lora.adapter import variant
from minilora.lora.config import LoraConfig
from minilora.lora.named import as_named
from minilora.training.settings import TrainConfig

__all__ = ["Result", "Trial"]

# Settings of a run that say how it is computed; a sweep computes in its own way.
_NOT_IN_A_SWEEP = {"compile": False, "offload": "none", "profile": 0, "save_every": 0}


@dataclass(frozen=True)
class Trial:
    """What one fine-tuning is asked to do.

    Args:
        lora: the adapter; None is full fine-tuning: every weight of a copy of the model trains.
        train: how; its ``seed`` gives the adapter's start, the order of the data and dropout.
        variant: name of a registered variant; None for the one that ``lora`` means.
        name: of the adapter and its folder; "" for a number.

    Raises:
        ConfigError: a setting that a sweep has its own way of (``compile``, ``offload``, ``profile``, ``save_every``).
    """

    lora: LoraConfig | None
    train: TrainConfig
    variant: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.train, TrainConfig) or not (self.lora is None or isinstance(self.lora, LoraConfig)):
            raise ConfigError("a trial is Trial(LoraConfig(...) or None, TrainConfig(...))")
        for name, usual in _NOT_IN_A_SWEEP.items():
            if (found := getattr(self.train, name)) != usual:
                raise ConfigError(
                    f"{name}={found!r}: no setting of one run in a sweep, which computes many; leave it out"
                )
        if self.variant is not None:
            variant(self.variant)
            if self.lora is None:
                raise ConfigError(f"variant={self.variant!r}: full fine-tuning has none; give a LoraConfig")
            as_named(self.lora, self.variant)

    @property
    def why_alone(self) -> str:
        """Why it cannot share a pass with others, in words; "" if nothing of its settings is against it."""
        if self.lora is None:
            return "full fine-tuning changes the base"
        if self.kind.replaces_base:
            return f"{self.kind.__name__} packs a base of its own"
        start = as_named(self.lora, self.variant).init_lora_weights
        if start in FROM_DATA:
            return f"{start} looks at the data before it starts"
        if self.lora.modules_to_save or self.lora.trainable_token_indices or self.lora.bias != "none":
            return "it trains more than updates of linear layers"
        if self.kind.depends_on_input:
            return f"{self.kind.__name__} looks at the tokens"
        return "riemannian_reg looks for its pairs in the whole model" if self.train.riemannian_reg else ""

    @property
    def kind(self) -> Any:
        """The class of its adapters on linear layers."""
        assert self.lora is not None
        return variant(self.variant or self.lora.variant)


@dataclass
class Result:
    """What came of a trial.

    Attributes:
        alone: why it ran after the others, "" for one that ran with them.
        ended: why it ended before its last step, in words; "" for one that came to its end. finished: nothing of it is left to do.
        records: as ``training.train`` returns them, without the memory. weights: the adapter as a file has it, on the CPU; for
            full fine-tuning all that trained, which no folder keeps, so that a sweep that is gone on from has none of what was done before.
        seconds: its part of the time that steps took: by its tokens, where several ran in one pass.
        measured: what ``measure`` found, by name.
    """

    trial: Trial
    name: str
    alone: str = ""
    ended: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    parameters: int = 0
    seconds: float = 0.0
    measured: dict[str, float] = field(default_factory=dict)
    finished: bool = False

    @property
    def losses(self) -> list[float]:
        """The training loss of every step that was not skipped, in nats a token."""
        return [record["loss"] for record in self.records if "loss" in record]

    @property
    def evaluations(self) -> dict[int, float | None]:
        """The evaluation loss by step, in nats a token; None where it was not finite."""
        return {record["step"]: record["eval_loss"] for record in self.records if "eval_loss" in record}

    @property
    def eval_loss(self) -> float | None:
        """The last evaluation loss of a trial that came to its end, or the lowest of one that keeps its best; None if not finite.

        As in ``training.best``, the evaluation before the first step is none that is kept.
        """
        losses = [loss for step, loss in self.evaluations.items() if step]
        if self.ended or not losses:
            return None
        finite = [loss for loss in losses if loss is not None]
        return min(finite, default=None) if self.trial.train.keep_best else losses[-1]

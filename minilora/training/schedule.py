"""What a run is asked to do, and what follows from it for each step: the learning rate, and the seed of dropout.

Nothing here needs torch. The texts under ``Args``, one line a field, are also what ``minilora train --help`` shows.
Next file: ``training/guards.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minilora.errors import ConfigError
from minilora.files import validate

__all__ = ["OFFLOAD_CHOICES", "OPTIMIZERS", "PACK_CHOICES", "SCHEDULE", "TrainConfig", "learning_rate", "step_seed"]

# The first is the default. What each is stands in ``training/optim.py``.
OPTIMIZERS = ("adamw", "adamw8", "adamw8bit_bnb", "paged_adamw8bit", "paged_adamw32bit")

SCHEDULE = (
    "steps",
    "optimizer",
    "lr",
    "warmup",
    "weight_decay",
    "clip",
    "seed",
    "compile",
)  # fields that, with the examples a step, make a run

PACK_CHOICES = ("auto", "on", "off")
OFFLOAD_CHOICES = ("none", "activations")
_MOST = 2**63 - 1  # what torch takes as a seed


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: length of the run, in optimizer steps.
        batch_size: examples of a micro-batch, packed or not.
        accumulate: micro-batches of an optimizer step, of all processes together.
        lr: peak learning rate, a number in (0, 1); LoRA wants about ten times that of full fine-tuning.
        warmup: share of the steps over which the rate rises, in [0, 1).
        weight_decay: AdamW's, a number in [0, 1).
        optimizer: AdamW, or with its state in 8 bits (adamw8): 2 bytes a trained number, not 8; the last three are bitsandbytes'.
        clip: largest norm of the gradient; 0 turns clipping off.
        seed: whole number that the order of the data, dropout and (in a whole job) the adapter's start follow from.
        eval_every: optimizer steps between evaluations; 0 is before the first and after the last step only.
        save_every: optimizer steps between checkpoints; 0 is the one after the last step alone.
        keep_checkpoints: newest checkpoints that stay, a whole number >= 1.
        max_skipped: optimizer steps in a row without a finite loss and gradient that end the run.
        pack: whether examples share rows, one behind the other, so that little is padding; a step's examples and its loss stay the same.
            "auto" packs where at least a fifth of the tokens are saved and the model can.
        profile: optimizer steps after the first that torch's profiler records, in trace.json of the run folder; 0 is none.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        offload: none; activations has what gradient_checkpointing keeps of a step wait in the memory of the CPU, not of the GPU.
        compile: let torch write kernels for the model's blocks; the first steps take a minute more, and dropout draws other numbers.

    Raises:
        ConfigError: a value that cannot be meant, by name.
    """

    steps: int = 60
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    clip: float = 1.0
    seed: int = 0
    eval_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    max_skipped: int = 5
    pack: str = "auto"
    profile: int = 0
    gradient_checkpointing: bool = False
    offload: str = "none"
    compile: bool = False

    def __post_init__(self) -> None:
        least = {
            "steps": 1,
            "batch_size": 1,
            "accumulate": 1,
            "seed": 0,
            "eval_every": 0,
            "save_every": 0,
            "profile": 0,
        }
        least |= {"keep_checkpoints": 1, "max_skipped": 1}
        for name, smallest in least.items():
            validate.whole(name, getattr(self, name), smallest, _MOST)
        for name, low, high in (("lr", 0, 1), ("warmup", 0, 1), ("weight_decay", 0, 1), ("clip", 0, math.inf)):
            validate.number(name, getattr(self, name), low, high)
        for name, choices in (("pack", PACK_CHOICES), ("offload", OFFLOAD_CHOICES), ("optimizer", OPTIMIZERS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={validate.shown(getattr(self, name))}: wanted one of {', '.join(choices)}")
        for name in ("gradient_checkpointing", "compile"):
            validate.flag(name, getattr(self, name))
        if self.offload == "activations" and not self.gradient_checkpointing:
            raise ConfigError("offload='activations': it moves what gradient_checkpointing keeps; set that as well")
        if self.lr == 0:
            raise ConfigError("lr=0: nothing would change; 1e-3 is usual for a small model, 2e-4 for a large one")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of step ``step`` (from 0): linear up to ``lr`` over the warm-up, then half a cosine down to zero."""
    rise = max(1, round(config.warmup * config.steps))
    if step < rise:
        return config.lr * (step + 1) / rise
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, config.steps - rise)))


def step_seed(seed: int, step: int) -> int:
    """The seed of torch's generator in a step: dropout is a function of (seed, step), so no random state need be saved."""
    return (seed * 1_000_003 + 7 * step + 3) % 2**63

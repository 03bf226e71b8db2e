"""What a run is asked to do: ``TrainConfig``. Nothing here needs torch.

The texts under ``Args``, one line a field, are also what ``minilora train --help`` shows. Next file: ``training/schedule.py``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from minilora.errors import ConfigError
from minilora.files import validate

__all__ = ["OFFLOAD_CHOICES", "OPTIMIZERS", "PACK_CHOICES", "SCHEDULE", "SCHEDULES", "SINCE", "TrainConfig"]

# The first is the default. What each is stands in ``training/optim.py``.
OPTIMIZERS = ("adamw", "adamw8", "sgd", "muon", "lora_fa", "adamw8bit_bnb", "paged_adamw8bit", "paged_adamw32bit")

# The first is the default. What each is stands in ``training/schedule.py``.
SCHEDULES = ("cosine", "linear", "constant", "wsd")

SCHEDULE = (
    "steps",
    "optimizer",
    "lr",
    "schedule",
    "warmup",
    "decay",
    "min_lr_ratio",
    "weight_decay",
    "clip",
    "seed",
    "compile",
    "patience",
    "min_delta",
    "keep_best",
    "loraplus_lr_ratio",
    "riemannian_reg",
)  # fields that, with the examples a step, make a run

# What a run did whose checkpoint does not say it yet.
SINCE = {
    "schedule": "cosine",
    "decay": 0.2,
    "min_lr_ratio": 0.0,
    "patience": 0,
    "min_delta": 0.0,
    "keep_best": False,
    "loraplus_lr_ratio": 1.0,
    "riemannian_reg": 0.0,
}

PACK_CHOICES = ("auto", "on", "off")
OFFLOAD_CHOICES = ("none", "activations")
_MOST = 2**63 - 1  # what torch takes as a seed
_STEPS = 60
_MOST_STEPS = 10**12
_MOST_EPOCHS = 1e9


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: length of the run, in optimizer steps.
        epochs: length of the run in passes over the training examples, a number > 0, instead of ``steps``.
        batch_size: examples of a micro-batch, packed or not.
        accumulate: micro-batches of an optimizer step, of all processes together.
        lr: peak learning rate, a number in (0, 1); LoRA wants about ten times that of full fine-tuning.
        schedule: how the rate goes after the warm-up: "cosine" and "linear" fall to the end, "constant" stays, "wsd" stays and falls over
            its last part (``decay``).
        warmup: steps over which the rate rises: a share of all steps in [0, 1), or a whole number >= 1 of them.
        decay: of "wsd", the steps over which the rate falls at the end: a share in [0, 1), or a whole number >= 1.
        min_lr_ratio: share of ``lr`` that the rate falls to, in [0, 1).
        weight_decay: as AdamW's, a number in [0, 1); sgd adds that share of a weight to its gradient.
        optimizer: AdamW, or with its state in 8 bits (adamw8): 2 bytes a trained number, not 8. sgd has momentum 0.9 and wants a larger
            lr; muon steps A and B by their orthogonalized momentum, and all else as AdamW does; lora_fa freezes A and corrects the
            gradient of B. The last three are bitsandbytes'.
        loraplus_lr_ratio: LoRA+: the rate of B is this number times that of A; 16 is the paper's, 1 is plain.
        riemannian_reg: number that is added to the diagonals of Riemannian preconditioned LoRA, which any > 0 turns on; 0.01 is usual.
        clip: largest norm of the gradient; 0 turns clipping off.
        seed: whole number that the order of the data, dropout and (in a whole job) the adapter's start follow from.
        eval_every: optimizer steps between evaluations; 0 is before the first and after the last step only.
        patience: number of evaluations in a row without a lower loss that ends the run; 0 is never. Those after the first step count.
        min_delta: number of nats a token by which a loss must be lower, for ``patience``.
        keep_best: end with the adapter of the lowest evaluation loss, not of the last step; its checkpoint stays.
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

    steps: int = _STEPS
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
    epochs: float | None = None
    schedule: str = SCHEDULES[0]
    decay: float = 0.2
    min_lr_ratio: float = 0.0
    patience: int = 0
    min_delta: float = 0.0
    keep_best: bool = False
    loraplus_lr_ratio: float = 1.0
    riemannian_reg: float = 0.0

    def __post_init__(self) -> None:
        least = {
            "steps": 1,
            "batch_size": 1,
            "accumulate": 1,
            "seed": 0,
            "eval_every": 0,
            "save_every": 0,
            "profile": 0,
            "patience": 0,
        }
        least |= {"keep_checkpoints": 1, "max_skipped": 1}
        for name, smallest in least.items():
            validate.whole(name, getattr(self, name), smallest, _MOST)
        self._check_numbers()
        choices_of = {"pack": PACK_CHOICES, "offload": OFFLOAD_CHOICES, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={validate.shown(getattr(self, name))}: wanted one of {', '.join(choices)}")
        for name in ("gradient_checkpointing", "compile", "keep_best"):
            validate.flag(name, getattr(self, name))
        if self.offload == "activations" and not self.gradient_checkpointing:
            raise ConfigError("offload='activations': it moves what gradient_checkpointing keeps; set that as well")
        self._check_rates()
        self._check_optimizer()
        for name in ("patience", "keep_best"):
            if getattr(self, name) and not self.eval_every:
                raise ConfigError(f"{name}: looks at the evaluations in between; set eval_every=10, for example")
        if self.min_delta and not self.patience:
            raise ConfigError(f"min_delta={self.min_delta}: belongs to patience; set patience=3, for example")

    def _check_numbers(self) -> None:
        """Numbers in their one form, so that 0 and 0.0 are the same run."""
        validate.rate("lr", self.lr)
        object.__setattr__(self, "lr", float(self.lr))
        for name, high in (
            ("weight_decay", 1),
            ("clip", math.inf),
            ("min_lr_ratio", 1),
            ("min_delta", math.inf),
            ("loraplus_lr_ratio", math.inf),
            ("riemannian_reg", math.inf),
        ):
            validate.number(name, getattr(self, name), 0, high)
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.loraplus_lr_ratio == 0 or self.lr * self.loraplus_lr_ratio >= 1:
            raise ConfigError(
                f"loraplus_lr_ratio={self.loraplus_lr_ratio}: wanted a number > 0 that leaves the rate of B under 1; lr is {self.lr}"
            )
        for name in ("warmup", "decay"):
            object.__setattr__(self, name, _part(name, getattr(self, name)))
        if self.epochs is not None:
            validate.number("epochs", self.epochs, 0, _MOST_EPOCHS)
            if self.epochs == 0:
                raise ConfigError("epochs=0: nothing would be learnt; wanted a number > 0")
            if self.steps != _STEPS:
                raise ConfigError(
                    f"steps={self.steps} and epochs={self.epochs}: both say how long the run is; give one"
                )

    def _check_rates(self) -> None:
        """What the settings of the rate mean together."""
        if self.schedule != "wsd" and self.decay != SINCE["decay"]:
            raise ConfigError(
                f"decay={self.decay}: belongs to schedule='wsd', not to {self.schedule!r}; drop one of them"
            )
        if self.schedule == "constant" and self.min_lr_ratio:
            raise ConfigError(
                f"min_lr_ratio={self.min_lr_ratio}: with schedule='constant' the rate does not fall; drop it"
            )
        rise, fall = (self.steps_of(name) for name in ("warmup", "decay"))
        parts = {"warmup": rise} | ({"decay": fall} if self.schedule == "wsd" else {})
        if self.epochs is None and sum(parts.values()) > max(self.steps, len(parts)):
            said = " and ".join(f"{name}={getattr(self, name)}" for name in parts)
            raise ConfigError(
                f"{said}: {sum(parts.values())} steps, and the run has {self.steps}; give less, or shares of the steps"
            )

    def _check_optimizer(self) -> None:
        """What looks at A and B together, where A does not train."""
        for name, plain in (("loraplus_lr_ratio", 1.0), ("riemannian_reg", 0.0)):
            if self.optimizer == "lora_fa" and getattr(self, name) != plain:
                raise ConfigError(
                    f"{name}={getattr(self, name)}: wants an A that trains, and optimizer='lora_fa' freezes it; leave it at {plain}, or "
                    "take another optimizer"
                )

    def steps_of(self, name: str) -> int:
        """The steps of ``warmup`` or ``decay``, at least 1."""
        part = getattr(self, name)
        return part if isinstance(part, int) else max(1, round(part * self.steps))

    def for_examples(self, count: int) -> TrainConfig:
        """The same with ``steps`` for ``epochs`` of so many examples; the last step is a whole one. Raises ``ConfigError`` as ever."""
        if self.epochs is None:
            return self
        wanted = round(self.epochs * count / (self.batch_size * self.accumulate), 6)  # 0.1 * 30 is more than 3
        return dataclasses.replace(self, epochs=None, steps=max(1, math.ceil(wanted)))


def _part(name: str, value: object) -> int | float:
    """Steps as a whole number, or a share of all steps. Raises ``ConfigError``."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and 0 <= value < 1:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    if is_number and 1 <= value <= _MOST_STEPS and value == int(value):  # type: ignore[operator, call-overload]
        return int(value)  # type: ignore[call-overload]
    raise ConfigError(
        f"{name}={validate.shown(value)}: wanted a share of the steps in [0, 1), such as 0.1, or a whole number of them, such as 20"
    )

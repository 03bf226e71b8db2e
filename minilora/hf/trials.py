"""What ``minilora plan`` and ``minilora bench`` are asked to try. Nothing here needs torch or transformers.

The texts under ``Args``, one line a field, are also what ``--help`` shows. Next file: ``hf/plan.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minilora.errors import ConfigError
from minilora.files import validate
from minilora.hf.places import AUTO, check_place, check_quant
from minilora.lora.config import LoraConfig
from minilora.lora.targets import check_form

__all__ = ["BenchJob", "PlanJob"]


@dataclass(frozen=True)
class PlanJob:
    """What to plan.

    Args:
        model: hub id, local folder (its config.json is enough to predict), GGUF file, or "smollm2".
        trust_remote_code: run the Python files that the model brings, with all your rights; without it no code of a model is run.
        r: rank of the update; lora_alpha is twice as much.
        lora_dropout: probability, in [0, 1), that an input of the adapter is dropped.
        target_modules: names of layers, one regular expression for the full path, or "all-linear".
        quant: format that the frozen linear layers are packed to, 4 bits (nf2, nf3, int8: 2, 3, 8); "none" leaves them dense.
        double_quant: keep the scales of packed weights in 8 bits (4.127 instead of 4.5 bits per weight with nf4).
        dtype: number format of the weights that are not packed; "auto" is bfloat16 on a GPU that has it, else float32.
        batch: examples of a micro-batch.
        seq: tokens of an example, all of them supervised.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        threads: threads of torch; 0 leaves their number to it.
        device: where the model goes: auto, cpu, cuda, cuda:N or mps; "auto" takes a CUDA GPU where one works, else the CPU.
        attention: implementation of attention in transformers: eager, sdpa, flash_attention_2 ...; "auto" leaves it to the model.

    Raises:
        ConfigError: a value that cannot be meant, by name.
    """

    model: str
    r: int = 8
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    quant: str = "none"
    double_quant: bool = True
    dtype: str = AUTO
    batch: int = 4
    seq: int = 128
    gradient_checkpointing: bool = False
    threads: int = 0
    trust_remote_code: bool = False
    device: str = AUTO
    attention: str = AUTO

    def __post_init__(self) -> None:
        check_quant(self.quant)
        check_place(self.device, self.dtype, self.attention)
        for name, least in (("r", 1), ("batch", 1), ("seq", 2), ("threads", 0)):
            validate.whole(name, getattr(self, name), least)
        for name in ("double_quant", "gradient_checkpointing", "trust_remote_code"):
            validate.flag(name, getattr(self, name))
        validate.text("model", self.model)
        check_form(self.lora().target_modules, "target_modules")

    def lora(self) -> LoraConfig:
        """The adapter's config."""
        targets: Any = list(self.target_modules) if isinstance(self.target_modules, tuple) else self.target_modules
        return LoraConfig(
            r=self.r,
            lora_alpha=2 * self.r,
            lora_dropout=self.lora_dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )


@dataclass(frozen=True)
class BenchJob(PlanJob):
    """``PlanJob``, run for some steps.

    Args:
        steps: optimizer steps of a run; the first of each is not counted.
        repeats: runs of each library, all from the same start.
        lr: learning rate, a number in (0, 1).
        seed: whole number that the adapter's start values and random tokens follow from.
        data: JSONL file as for ``minilora train``, "demo", or "random" for random tokens.

    Raises:
        ConfigError: a value that cannot be meant, by name.
    """

    steps: int = 6
    repeats: int = 2
    lr: float = 1e-3
    seed: int = 0
    data: str = "demo"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("steps", 1), ("repeats", 1), ("seed", 0)):
            validate.whole(name, getattr(self, name), least)
        validate.text("data", self.data)
        if self.lora_dropout:
            raise ConfigError(
                "lora_dropout: each library draws it in its own way, so losses could not agree; leave it at 0"
            )
        validate.rate("lr", self.lr)

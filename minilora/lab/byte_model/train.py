"""Train the byte model from nothing: ``python -m minilora.lab.byte_model.train --minutes 30``, on one core.

Its text is the prose that this Python brings along (``texts.docs``). Every step takes random pieces of it, drawn with the seed; AdamW
(Loshchilov and Hutter 2019, arXiv 1711.05101) with a warm-up and half a cosine down to zero (arXiv 1608.03983).
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError, MiniLoraError, TrainingError, WriteError
from minilora.files.parse import tensor_bytes
from minilora.files.validate import whole
from minilora.files.write import write_file
from minilora.lab.byte_model.model import PAD_ID, WEIGHTS, byte_model, to_store
from minilora.lab.byte_model.texts import docs, text_examples
from minilora.training.losses import evaluate

__all__ = ["bits_per_byte", "main", "train"]

BATCH, LENGTH = 4, 256  # pieces of a step, and bytes of each: at this size more steps are worth more than larger ones
LR, WARMUP = 4e-3, 0.04  # the highest rate, and the share of the run in which it rises
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.1, 1.0


def train(
    steps: int | None = None, minutes: float | None = None, seed: int = 0, say: Callable[[str], None] = print
) -> tuple[Any, int]:
    """A model trained from fresh weights, in eval mode, and the steps that it took.

    Args:
        steps: how many; the same seed then gives the same model on the same computer.
        minutes: or as many as fit into this time: the rate follows the clock, so a busy computer makes fewer steps, not a worse end.
        seed: of the weights and of the pieces of text. say: gets a line of progress now and then.

    Raises:
        ConfigError: not exactly one of ``steps`` and ``minutes``, or it is no positive number. TrainingError: the loss is not finite.
    """
    _refuse(steps, minutes)
    text = torch.frombuffer(bytearray(docs()), dtype=torch.uint8).long()
    model = byte_model(seed=seed, pretrained=False).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    draw = torch.Generator().manual_seed(seed)
    begun, done, shown, mean = time.monotonic(), 0, 0.0, math.nan
    while (gone := done / steps if steps else (time.monotonic() - begun) / (60 * (minutes or 0))) < 1:
        loss = _step(model, optimizer, _pieces(text, draw), LR * _share(gone))
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} in step {done + 1}; try another seed")
        done, mean = done + 1, loss if math.isnan(mean) else 0.98 * mean + 0.02 * loss
        if gone >= shown:
            spent = time.monotonic() - begun
            say(f"{gone:4.0%}  step {done}  loss {mean:.3f}  {spent:.0f} s, {done / spent:.1f} steps a second")
            shown += 0.02
    return model.eval().requires_grad_(False), done


def bits_per_byte(model: nn.Module, text: bytes, length: int = LENGTH) -> float:
    """The cross-entropy of a text in bits a byte, in pieces of ``length`` bytes that know nothing of each other.

    The first byte of a piece is not predicted, and a shorter end is left out.
    """
    return evaluate(model, text_examples(text, length), 32, PAD_ID) / math.log(2)


def main(words: Sequence[str] | None = None) -> int:
    """The command. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m minilora.lab.byte_model.train", description=__doc__)
    parser.add_argument("--minutes", type=float, help="train as long as this (30 unless --steps is given)")
    parser.add_argument("--steps", type=int, help="or as many steps")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the pieces of text (0)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file to write (the one that the package loads)")
    given = parser.parse_args(words)
    minutes = 30.0 if given.steps is None and given.minutes is None else given.minutes
    try:
        _refuse_place(given.out)
        model, steps = train(given.steps, minutes, given.seed, lambda line: print(line, flush=True))
        print(write(model, steps, given.seed, given.out))
    except MiniLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def write(model: Any, steps: int, seed: int, path: Path) -> str:
    """Write the weights with what is known of them, and say it in a line. The held-out loss is that of the weights as stored."""
    stored = to_store(model)
    model.load_state_dict(stored, strict=False)
    bits = bits_per_byte(model, docs(held_out=True))
    about = {
        "format": "pt",
        "license": "CC0-1.0",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "steps": str(steps),
        "seed": str(seed),
        "held_out_bits_per_byte": f"{bits:.4f}",
    }
    write_file(path, tensor_bytes(stored, about))
    return f"{path}: {steps} steps, {bits:.3f} bits a byte of the held-out prose"


# ---- one step


def _step(model: Any, optimizer: torch.optim.Optimizer, pieces: Tensor, lr: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = model(input_ids=pieces, labels=pieces, use_cache=False).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def _pieces(text: Tensor, draw: torch.Generator) -> Tensor:
    """int64 ``[BATCH, LENGTH]``, each from anywhere in the text."""
    starts = torch.randint(0, len(text) - LENGTH + 1, (BATCH, 1), generator=draw)
    return text[starts + torch.arange(LENGTH)]


def _share(gone: float) -> float:
    """The share of the highest rate when a share ``gone`` of the run, in [0, 1), is over."""
    if gone < WARMUP:
        return (gone + 1e-3) / (WARMUP + 1e-3)  # the first step has a rate, too
    return 0.5 * (1 + math.cos(math.pi * (gone - WARMUP) / (1 - WARMUP)))


def _refuse(steps: int | None, minutes: float | None) -> None:
    if (steps is None) == (minutes is None):
        raise ConfigError(f"steps={steps} and minutes={minutes}: wanted one of them; leave the other out")
    if steps is not None:
        whole("steps", steps, 1)
    elif minutes is not None and not 0 < minutes < math.inf:
        raise ConfigError(
            f"minutes={minutes}: wanted a number above 0; 30 trains the model that comes with the package"
        )


def _refuse_place(path: Path) -> None:
    """What could not be written at the end is refused at the start."""
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise WriteError(f"{path}: cannot be written; name a file in a folder that is there and writable")


if __name__ == "__main__":
    sys.exit(main())

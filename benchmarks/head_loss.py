"""What does the loss of an output head cost with all its logits, and a few tokens at a time? Time, memory and how far they differ.

    python benchmarks/head_loss.py [--rounds N] [--tokens N]

The loss and the gradient of what goes into the head, one thread, for the heads of SmolLM2-135M and Qwen2.5-0.5B. Both ways take
turns. Times are processor time; memory is what one call adds to the process at its peak. Writes ``results/head_loss.csv``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from record import RESULTS, stamp, write_csv
from torch import Tensor, nn

from minilora.linear.layers import in_front
from minilora.measure.worker import anonymous_bytes, peak_anonymous_bytes, reset_peak
from minilora.training.chunked import head_losses, reference

HEADS = {"SmolLM2-135M": (49_152, 576), "Qwen2.5-0.5B": (151_936, 896)}  # vocabulary, width
Loss = Callable[[Tensor, Tensor, nn.Linear], Tensor]
WAYS: dict[str, Loss] = {"all logits": reference, "in chunks": head_losses}


class Case:
    """A head and what goes into it: numbers drawn so that the logits have the spread of a language model's."""

    def __init__(self, vocabulary: int, width: int, tokens: int, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)
        self.head = nn.Linear(width, vocabulary, bias=False, dtype=dtype).requires_grad_(False)
        self.head.weight.copy_(torch.randn(vocabulary, width, generator=draw) / width**0.5)
        in_front([self.head])  # as ``inject`` does
        self.hidden = (2 * torch.randn(tokens, width, generator=draw)).to(dtype)
        self.targets = torch.randint(0, vocabulary, (tokens,), generator=draw)
        self.shares = torch.rand(tokens, generator=draw) / tokens

    def run(self, loss: Loss) -> tuple[Tensor, Tensor, float, int]:
        """Losses, gradient, seconds of processor time, bytes."""
        hidden = self.hidden.clone().requires_grad_()
        before = anonymous_bytes()
        reset_peak()
        begin = time.process_time()
        losses = loss(hidden, self.targets, self.head)
        (losses * self.shares).sum().backward()
        seconds = time.process_time() - begin
        assert hidden.grad is not None
        return losses.detach(), hidden.grad, seconds, peak_anonymous_bytes() - before


def row(name: str, dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, Any]:
    """One head in one dtype."""
    vocabulary, width = HEADS[name]
    case = Case(vocabulary, width, tokens, dtype)
    samples: dict[str, list[tuple[Tensor, Tensor, float, int]]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):  # the first round warms up
        for way, loss in WAYS.items():
            found = case.run(loss)
            if number:
                samples[way].append(found)
    whole, chunks = (samples[way][-1] for way in WAYS)
    size = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    made: dict[str, Any] = {"what": f"{name}, {size}", "vocabulary": vocabulary, "width": width, "tokens": tokens}
    for way, found in samples.items():
        seconds, sizes = [each[2] for each in found], [each[3] / 1e6 for each in found]
        made |= {f"{way} s": f"{statistics.median(seconds):.3f}", f"{way} s least": f"{min(seconds):.3f}"}
        made |= {f"{way} s most": f"{max(seconds):.3f}", f"{way} MB": f"{statistics.median(sizes):.1f}"}
    ratio = statistics.median(each[2] for each in samples["in chunks"]) / statistics.median(
        each[2] for each in samples["all logits"]
    )
    made |= {"time in chunks / all": f"{ratio:.3f}", "loss differs by": f"{(whole[0] - chunks[0]).abs().max():.1e}"}
    apart = ((whole[1] - chunks[1]).float().norm() / whole[1].float().norm()).item()
    return made | {"gradient differs by": f"{apart:.1e}", "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=1024)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name in HEADS:
            rows.append(row(name, dtype, chosen.tokens, chosen.rounds))
            print(rows[-1], flush=True)
    write_csv(RESULTS / "head_loss.csv", rows, stamp())


if __name__ == "__main__":
    main()

"""The gradients of one step, and what is wrong with them.

The loss is the mean over the supervised tokens of a whole step: with accumulation the micro-batches are weighted by their tokens, so that
cutting a batch in two changes nothing, and packing examples into rows neither. The gradients are added in one order whatever the number
of processes. Next file: ``training/memory.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data.batches import Collate, collate
from minilora.data.encoding import Encoded
from minilora.training.compiling import as_written
from minilora.training.guards import first_nonfinite_gradient, first_nonfinite_output
from minilora.training.losses import token_losses
from minilora.training.offload import offloaded
from minilora.training.processes import ALONE, Processes

__all__ = ["descend", "gradients", "not_finite", "why_not_begun"]


def gradients(
    model: nn.Module,
    named: Mapping[str, nn.Parameter],
    batches: Sequence[Sequence[Encoded]],
    pad_id: int,
    seeds: Sequence[int],
    processes: Processes = ALONE,
    sharded: bool = False,
    tensors: Collate = collate,
    offload: bool = False,
) -> tuple[float, Tensor, str | None]:
    """Put the gradients of a step into ``named``, over all its micro-batches, each of which one process takes.

    Args:
        batches: all micro-batches of the step, in every process. seeds: of torch's generator, one for each: dropout is the
            micro-batch's, whoever takes it. sharded: the processes hold parts of the model, and call it equally often.
        tensors: makes what the model is called with of a micro-batch. offload: what is kept for the backward pass goes to the CPU.

    Returns:
        The step's loss, the norm of all gradients (0-dimensional), and what is not finite, in words, or None: the same in all processes.

    Raises:
        MemoryError: there is no memory for it in one of them.
    """
    parameters, part, losses = list(named.values()), processes.part(len(batches)), []
    supervised = sum(example.supervised for batch in batches for example in batch)  # of all processes

    def backward(number: int) -> None:
        torch.manual_seed(seeds[number])
        with offloaded(model, offload):
            loss = token_losses(model, tensors(batches[number], pad_id)).sum() / supervised
        # What this micro-batch reaches may hold no adapter: an expert that saw no token, a layer left out at random.
        if loss.requires_grad:
            loss.backward()
        losses.append(loss.detach())

    def own() -> dict[str, Any]:
        sums = _pairwise(parameters, part, backward)
        for parameter, gradient in zip(parameters, sums, strict=True):
            parameter.grad = gradient
        values = torch.stack(losses).tolist()  # one wait for the device in a step
        bad = next((place for place, value in enumerate(values) if not math.isfinite(value)), None)
        problem = None
        if bad is not None:
            where = f" ({processes.name(processes.rank)})" if processes.size > 1 else ""
            problem = f"the loss is {values[bad]} in micro-batch {part[bad] + 1}{where}"
            if not sharded:  # one process alone cannot call a model in shards
                torch.manual_seed(seeds[part[bad]])
                problem += f"; {_why_loss(model, tensors(batches[part[bad]], pad_id))}"
        without = [place for place, gradient in enumerate(sums) if gradient is None]
        return {"losses": values, "problem": problem, "without": without}

    every = processes.attempt(own, sharded)
    total = sum(loss for one in every for loss in one["losses"])
    if problem := next((one["problem"] for one in every if one["problem"]), None):
        return total, torch.tensor(math.nan), problem
    nowhere = set.intersection(*(set(one["without"]) for one in every))
    for place, parameter in enumerate(parameters):
        if parameter.grad is None and place not in nowhere:
            parameter.grad = torch.full_like(parameter, -0.0)  # which changes no bit of what it is added to
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    processes.add(found, processes.is_exact(len(batches)))
    norm = nn.utils.get_total_norm(found)
    return total, norm, not_finite(total, norm, named)


def _pairwise(parameters: Sequence[nn.Parameter], part: range, backward: Callable[[int], None]) -> list[Tensor | None]:
    """The sums of the gradients of some micro-batches, as a tree: one half's and the other half's, each summed in the same way.

    So the micro-batches of 2, 4, ... processes are branches of the tree of one. An odd number is added one after the other; so are two,
    which comes to the same and needs no second place.
    """
    if len(part) % 2 or len(part) == 2:
        for number in part:
            backward(number)
        sums = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return sums
    half = len(part) // 2
    left, right = _pairwise(parameters, part[:half], backward), _pairwise(parameters, part[half:], backward)
    return [a if b is None else b if a is None else a.add_(b) for a, b in zip(left, right, strict=True)]


def _why_loss(model: nn.Module, batch: dict[str, Tensor]) -> str:
    with as_written(model):
        first = first_nonfinite_output(model, lambda: token_losses(model, batch))
    return f"{first} is the first to return NaN or infinity" if first else "every module returns finite values"


def descend(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], norm: Tensor, clip: float, rate: float
) -> bool:
    """Change the weights by their gradients, whose norm it is, and forget these; whether all weights are finite then.

    Args:
        clip: largest norm of the gradient, 0 for any. rate: of this step, which each group multiplies by its ``lr_ratio``.
    """
    if clip:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
    optimizer.step()
    optimizer.zero_grad()
    return math.isfinite(float(nn.utils.get_total_norm([parameter.detach() for parameter in parameters])))


def not_finite(total: float, norm: Tensor, named: Mapping[str, nn.Parameter]) -> str | None:
    """What of a step's gradients is not finite, in words; None if nothing is."""
    if math.isfinite(float(norm)):
        return None
    first = first_nonfinite_gradient(named.items())
    said = f"the gradient of {first} is not finite" if first else "the gradients are finite, their norm overflows"
    return f"{said} (loss {total:.4g})"


def why_not_begun(problem: str | None) -> str:
    """Why a run stops at its first step: ``problem`` of ``gradients``, or None where they are all zero."""
    if problem:
        return f"the first step has no finite gradient: {problem}; look at the base model's weights, its dtype and the first examples"
    return "the first gradient is zero everywhere, so nothing would train; does the loss depend on an adapted layer?"

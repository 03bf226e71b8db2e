"""Cross-entropy of an output head without its logits: a few tokens at a time.

The logits of 1,024 tokens over a vocabulary of 152,000 are 620 MB in fp32, and as many again for each copy that the loss and its
gradient make. Only two things are wanted of them: a loss for each token, and the gradient of what went into the head. Both can be had
of a few tokens at a time (Wijmans et al. 2024, arXiv 2411.09009): with ``p`` the softmax of a token's logits ``W h + b`` and ``t`` its
target,

    loss = log(sum(exp(W h + b))) - (W h + b)[t]         d loss / d h = W^T (p - onehot(t))

so the gradient is computed at once, beside the loss, and the backward pass only scales it. The head is frozen and gets none.
``reference`` defines what ``head_losses`` computes. Next file: ``training/head.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.linear.ops import matmul

__all__ = ["cross_entropy", "head_losses", "reference"]

_ROOM = 96_000_000  # bytes of logits, in all their dtypes, that are there at a time
_STEP = 32  # tokens: matrix products are slower at odd sizes


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each token, fp32 ``[tokens]``, of logits ``[tokens, vocabulary]`` in any floating dtype."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def reference(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    """What ``head_losses`` computes, with all logits at once."""
    return cross_entropy(head(hidden), targets)


def head_losses(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    """Cross-entropy in nats of each token, fp32 ``[tokens]``; only ``hidden`` gets a gradient.

    Args:
        hidden: what goes into the head, ``[tokens, in]``, in the dtype of its weight. targets: int64 ``[tokens]``, in ``[0, vocabulary)``.
        head: frozen; its weight ``[vocabulary, in]`` and its bias are read, its ``forward`` is not called.
    """
    losses: Tensor = _HeadLosses.apply(hidden, targets, head.weight, head.bias)
    return losses


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        count, vocabulary = len(hidden), len(weight)
        size = min(count, _tokens_at_a_time(vocabulary, hidden.dtype))
        room = hidden.new_empty(size, vocabulary, dtype=torch.float32)  # the same memory for every few
        losses = hidden.new_empty(count, dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for at in range(0, count, size):
            some, wanted = hidden[at : at + size], targets[at : at + size, None]
            logits = _logits(some, weight, bias, room[: len(some)])
            top = logits.amax(1, keepdim=True)
            hit = logits.gather(1, wanted) - top
            total = logits.sub_(top).exp_().sum(1, keepdim=True)
            losses[at : at + size] = (total.log() - hit).squeeze(1)
            if gradient is not None:
                error = logits.div_(total)  # the softmax, and minus one where the target is
                error.scatter_add_(1, wanted, torch.full_like(total, -1.0))
                gradient[at : at + size] = matmul(error.to(hidden.dtype), weight, transpose=False)
        ctx.save_for_backward(*([] if gradient is None else [gradient]))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None


def _tokens_at_a_time(vocabulary: int, dtype: torch.dtype) -> int:
    half = 0 if dtype == torch.float32 else dtype.itemsize  # beside the fp32 logits, which are there in any case
    most = _ROOM // ((4 + half) * vocabulary)
    return most // _STEP * _STEP or max(1, most)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, room: Tensor) -> Tensor:
    """The head's output, rounded to its own dtype, as fp32 in ``room``."""
    if hidden.dtype != torch.float32:
        return room.copy_(matmul(hidden, weight, transpose=True, bias=bias))
    if bias is None:
        return torch.mm(hidden, weight.t(), out=room)
    return torch.addmm(bias, hidden, weight.t(), out=room)

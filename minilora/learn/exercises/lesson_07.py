"""Lesson 7. The backward pass through a packed weight, and what is not saved.

A frozen weight gets no gradient, but the gradient goes through it to the layers before. The dense weight is needed in the backward pass
again; it is decoded a second time rather than kept. Fill in the functions; ``minilora learn check 7`` looks at them.
"""

from collections.abc import Callable

import torch


def gradient_of_x(g: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float) -> torch.Tensor:
    """The gradient of the input of y = W x + scaling B A x, by hand, without forming B A.

    g, the gradient of y, is [tokens, out]; W [out, in], A [r, in], B [out, r]; all fp32. Returns [tokens, in].
    """
    raise NotImplementedError


def frozen_linear(x: torch.Tensor, decode: Callable[[], torch.Tensor]) -> torch.Tensor:
    """x W^T for autograd, where ``decode()`` returns W [out, in] fp32; no dense tensor of W's size is kept for the backward pass.

    x is [tokens, in] fp32 and may want a gradient. Write a torch.autograd.Function, and call decode() in the forward and again in the
    backward pass.
    """
    raise NotImplementedError


def kept_bytes(tokens: int, in_features: int, out_features: int, r: int, itemsize: int) -> int:
    """Bytes of activations that y = W x + scaling B A x has to keep for the gradients of A and B, and of x.

    Weights are there anyway and do not count, nor does what belongs to the next layer. ``itemsize`` is the bytes of a number. W is frozen.
    """
    raise NotImplementedError

"""Lesson 2. LoRA in twenty lines.

    y = W x + (lora_alpha / r) B A x            (Hu et al. 2021, arXiv 2106.09685, section 4.1)

Why does B start at zero and A at random, what does lora_alpha / r do, and what are the gradients? A row of x is one input, as in
torch.nn.functional.linear. Fill in the functions; ``minilora learn check 2`` looks at them.
"""

import torch


def start(in_features: int, out_features: int, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r], fp32, as training begins: the layer is what it was, and the first gradient of B is not zero.

    How A is drawn is yours; it is drawn anew in every call.
    """
    raise NotImplementedError


def forward(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, lora_alpha: float) -> torch.Tensor:
    """The output of the adapted layer, without forming B A.

    x is [tokens, in], W [out, in], A [r, in], B [out, r], all fp32. Returns [tokens, out].
    """
    raise NotImplementedError


def delta_weight(A: torch.Tensor, B: torch.Tensor, lora_alpha: float) -> torch.Tensor:
    """What the adapter adds to W, [out, in]: W + delta_weight does what ``forward`` does."""
    raise NotImplementedError


def gradients(
    x: torch.Tensor, g: torch.Tensor, A: torch.Tensor, B: torch.Tensor, lora_alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of A [r, in] and B [out, r] by hand, without autograd.

    x is [tokens, in]; g, the gradient of the loss with respect to the layer's output, is [tokens, out].
    """
    raise NotImplementedError

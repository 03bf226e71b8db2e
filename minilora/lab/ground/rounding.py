"""What is lost when the weights of a model are rounded to a few bits, as KL to the model as it was.

How well a block of weights rounds depends on where blocks begin, and a model suffers more on some texts than on others. So each piece of
text is read with blocks that begin elsewhere, and an interval over the pieces covers both. Next file: ``lab/ground/ground.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from minilora.data.encoding import Encoded
from minilora.lab.ground.ground import kl, log_probabilities
from minilora.lora.match import ALL_LINEAR
from minilora.qlora.quantize_model import quantizable_paths
from minilora.quant.blockwise import quantize
from minilora.quant.config import QuantConfig

__all__ = ["harm", "rounded"]

PIECES = 4


def harm(
    model: Any, formats: Mapping[str, QuantConfig], text: Sequence[Encoded], pieces: int = PIECES
) -> dict[str, dict[int, float]]:
    """KL(model || rounded model) in nats a token, by format and by piece of the text.

    Args:
        model: dense; all its linear layers but the head are rounded, in a copy. text: examples of one length, cut into so many ``pieces``.
    """
    worse, paths = copy.deepcopy(model), quantizable_paths(model, ALL_LINEAR)
    found: dict[str, dict[int, float]] = {name: {} for name in formats}
    for number in range(pieces):
        piece = text[number * len(text) // pieces : (number + 1) * len(text) // pieces]
        before = log_probabilities(model, piece)
        for name, config in formats.items():
            for path in paths:
                exact = model.get_submodule(path).weight
                worse.get_submodule(path).weight.data = rounded(exact, config, number * config.blocksize // pieces)
            found[name][number] = kl(before, worse, piece)
    return found


def rounded(weight: Tensor, config: QuantConfig, offset: int = 0) -> Tensor:
    """The weight as its format gives it back, in its shape and dtype; the first block begins at the weight of number ``offset``."""
    turned = weight.detach().flatten().roll(-offset)
    return quantize(turned, config).dequantize().roll(offset).view_as(weight)

"""Mutants that nearly any input shows, if it is not a special one. Next file: ``learn/mutants/middle.py``."""

from __future__ import annotations

from minilora.learn.mutant import Mutant

__all__ = ["EASY", "EXAMPLE"]

EXAMPLE = "from minilora.data.encoding import Encoded\nexample = Encoded((11, 12, 13), (-100, 12, 13))  # ids, labels"

_LAYER = """
import torch
from torch import nn
from minilora import LoRALinear, LoraConfig


def show():
    layer = LoRALinear(nn.Linear(3, 2), LoraConfig(r=2, lora_alpha={alpha}))
    with torch.no_grad():
        layer.lora_B.fill_(1.0)
    return (layer,)
"""

EASY = (
    Mutant(
        "lora.targets:ends_with",
        "`ends_with` says whether an entry of target_modules names a module.",
        'path.endswith("." + entry)',
        "path.endswith(entry)",
        witness='def show():\n    return "layers.0.up_proj", "proj"\n',
        plain='def show():\n    return "layers.0.up_proj", "up_proj"\n',
    ),
    Mutant(
        "lora.layer:LoRALinear.delta_weight",
        "`delta_weight` is what an adapted layer adds to its weight when it is merged.",
        "return self.scaling * (B @ A)",
        "return B @ A",
        witness=_LAYER.format(alpha=6),
        plain=_LAYER.format(alpha=2),
        makes="from minilora import LoraConfig, LoRALinear\n"
        "layer = LoRALinear(torch.nn.Linear(3, 2), LoraConfig(r=2, lora_alpha=2))",
    ),
    Mutant(
        "quant.scales:absmax_scales",
        "`absmax_scales` finds what each block of weights is divided by.",
        "largest = blocks.abs().amax(1)",
        "largest = blocks.amax(1)",
        witness="import torch\nfrom minilora.quant.codebooks import NF4\n\n\n"
        "def show():\n    return torch.tensor([[0.5, -2.0]]), NF4\n",
        plain="import torch\nfrom minilora.quant.codebooks import NF4\n\n\n"
        "def show():\n    return torch.tensor([[0.5, 2.0]]), NF4\n",
        makes="from minilora.quant.codebooks import NF4",
    ),
    Mutant(
        "quant.lookup:pack",
        "`pack` puts codes of few bits into bytes.",
        "shifts = torch.arange(group - 1, -1, -1, device=codes.device) * bits",
        "shifts = torch.arange(group, device=codes.device) * bits",
        witness="import torch\n\n\ndef show():\n    return torch.tensor([1, 2], dtype=torch.uint8), 4\n",
        plain="import torch\n\n\ndef show():\n    return torch.tensor([3, 3], dtype=torch.uint8), 4\n",
    ),
    Mutant(
        "data.batches:collate",
        "`collate` makes the tensors of a batch from examples of different lengths.",
        "padded([example.labels for example in batch], IGNORED)",
        "padded([example.labels for example in batch], pad_id)",
        witness="from minilora.data.encoding import Encoded\n\n\n"
        "def show():\n    return [Encoded((1, 2, 3), (-100, 2, 3)), Encoded((1, 2), (-100, 2))], 0\n",
        plain="from minilora.data.encoding import Encoded\n\n\n"
        "def show():\n    return [Encoded((1, 2, 3), (-100, 2, 3)), Encoded((4, 5, 6), (-100, 5, 6))], 0\n",
        makes=EXAMPLE,
    ),
    Mutant(
        "many.arithmetic:magnitude_based_pruning",
        "`magnitude_based_pruning` keeps the values of largest magnitude, as TIES does before it adds updates up.",
        "tensor.abs().flatten()",
        "tensor.flatten()",
        witness="import torch\n\n\ndef show():\n    return torch.tensor([1.0, -3.0]), 0.5\n",
        plain="import torch\n\n\ndef show():\n    return torch.tensor([1.0, 3.0]), 0.5\n",
    ),
)

"""How much of what a GPU can compute a step used (model FLOPs utilization: PaLM, https://arxiv.org/abs/2204.02311, appendix B).

Counted is what the model asks for, not what is computed again by gradient checkpointing: two operations a weight and token forward, two
for the gradient of the layer's input, and two more for the factors that train. The products inside attention are left out, so the share
is a little too small for long texts; of a mixture the experts that a token takes count. Next file: ``training/loop.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from minilora.linear.experts.layers import is_experts
from minilora.linear.layers import dense_shape, in_out_features, is_linear
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.slots import unwrapped

__all__ = ["flops_a_token", "peak_flops"]

# Dense products in bf16 (fp16 where there is no bf16), in 1e12 operations a second, from the makers' data sheets. The first that the
# device's name contains counts.
_PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "T4": 65.0,
}


def peak_flops(device: torch.device) -> float | None:
    """Operations a second that a device can do at most; None where that is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = name.replace("-", " ").split()
    found = (peak for known, peak in _PEAKS.items() if all(word in words for word in known.split()))
    return next((peak * 1e12 for peak in found), None)


def flops_a_token(model: nn.Module) -> tuple[float, float]:
    """Operations of a training step for each token, and for each token whose logits are computed (the head's)."""
    model = unwrapped(model)
    try:
        head = getattr(model, "get_output_embeddings", lambda: None)()
    except NotImplementedError:
        head = None
    body = logits = 0.0
    for _, layer in Bare(model).named_modules():
        if is_linear(layer) or isinstance(layer, nn.Linear):
            each = 4.0 * math.prod(in_out_features(layer))
            body, logits = (body, logits + each) if layer is head else (body + each, logits)
        elif is_experts(layer):
            body += 4.0 * math.prod(in_out_features(layer)) * _taken(model)
    for module in model.modules():  # factors are matrices too; tables whose rows are looked up multiply nothing
        if isinstance(module, Adapter) and module.on != "embedding":
            own = sum(part.numel() for part in module.parameters() if part.requires_grad and part.dim() >= 2)
            body += 6.0 * own * (_taken(model) / dense_shape(module.innermost)[0] if module.on == "experts" else 1)
    return body, logits


def _taken(model: nn.Module) -> float:
    """How many experts each token takes; 0 where the model's config does not say it in a usual way."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
    found = (getattr(config, name, None) for name in names)
    return float(next((value for value in found if isinstance(value, int)), 0))

"""What an optimizer keeps of each parameter, as a checkpoint holds it: tensors by name, the same for every optimizer that a run may have.

A checkpoint's tensor is called ``<what>/<parameter>``, as ``exp_avg/model.layers.0.self_attn.q_proj.lora_A``. Next file:
``training/checkpoint.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from minilora.training.optim_adamw8 import AdamW8bit
from minilora.training.optim_bnb import bnb_form, bnb_state, put_bnb_state
from minilora.training.optim_lora_fa import LoraFAOptimizer
from minilora.training.optim_muon import MuonWithAdamW

__all__ = ["NEVER_NEGATIVE", "form_of", "put_state", "state_bytes", "state_form", "state_tensors"]

Form = tuple[torch.Size, torch.dtype]
# Means of squares, and largest magnitudes: the step takes the root of one, and multiplies by the other.
NEVER_NEGATIVE = {"exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax", "state2", "absmax1", "absmax2"}


def form_of(tensor: Tensor) -> Form:
    """Shape and dtype."""
    return tensor.shape, tensor.dtype


def state_tensors(optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """All that the optimizer holds, on the CPU; nothing of a parameter that no step has changed yet."""
    found: dict[str, Tensor] = {}
    for path, parameter in named.items():
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        kept = bnb_state(state) if _is_bnb(optimizer) else state
        if isinstance(optimizer, LoraFAOptimizer) and kept:
            kept = kept | {
                "step": torch.tensor(float(kept["step"]))
            }  # which it counts as PEFT's does, in a plain number
        found |= {f"{what}/{path}": kept[what].cpu().contiguous() for what in sorted(kept)}
    return found


def state_form(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Form]:
    """Shape and dtype of all that the optimizer holds of a parameter, by what it is."""
    if isinstance(optimizer, AdamW8bit):
        return optimizer.state_form(parameter)
    if _is_bnb(optimizer):
        return bnb_form(optimizer, parameter)
    own = form_of(parameter)
    if not parameter.requires_grad:
        return {}  # LoRA-FA's A, which is only read
    if isinstance(optimizer, SGD) or (isinstance(optimizer, MuonWithAdamW) and optimizer.is_muons(parameter)):
        return {"momentum_buffer": own}
    return {"exp_avg": own, "exp_avg_sq": own, "step": (torch.Size(), torch.float32)}  # AdamW's, and LoRA-FA's


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that the optimizer holds once every parameter has been in a step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return sum(
        shape.numel() * kind.itemsize for each in parameters for shape, kind in state_form(optimizer, each).values()
    )


def put_state(optimizer: Optimizer, named: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``state_tensors`` gave into an optimizer that has made no step; the forms are those of ``state_form``."""
    kept: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        what, _, path = key.partition("/")
        kept.setdefault(path, {})[what] = tensor.clone()
    if _is_bnb(optimizer):
        for path, state in kept.items():
            put_bnb_state(optimizer, named[path], state)
        return
    own = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    index = {parameter: number for number, parameter in enumerate(own)}
    held = {index[id(named[path])]: state for path, state in kept.items()}
    optimizer.load_state_dict({"state": held, "param_groups": optimizer.state_dict()["param_groups"]})
    if isinstance(optimizer, LoraFAOptimizer):
        for state in optimizer.state.values():
            state["step"] = int(state["step"])


def _is_bnb(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.partition(".")[0] == "bitsandbytes"

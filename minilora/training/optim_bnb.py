"""bitsandbytes' own optimizers by name, where it is installed: its AdamW with 8-bit state, and the two that page their state.

A paged optimizer keeps its state where the driver may move it to the computer's memory while the GPU's is full, and back for the step;
a sequence that is longer than all before it then slows a run down and does not end it (QLoRA, Dettmers et al. 2023, section 3). It needs
CUDA: on a CPU bitsandbytes would leave the paging out, which is refused here. Next file: ``training/optim_muon.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minilora.errors import ConfigError, MissingPackageError

__all__ = ["BNB", "bnb_form", "bnb_optimizer", "bnb_state", "put_bnb_state"]

# Our name to theirs, and the devices that it has code for.
BNB = {
    "adamw8bit_bnb": ("AdamW8bit", ("cpu", "cuda")),
    "paged_adamw8bit": ("PagedAdamW8bit", ("cuda",)),
    "paged_adamw32bit": ("PagedAdamW32bit", ("cuda",)),
}
_KEPT = ("step", "state1", "state2", "absmax1", "absmax2")  # the tables of levels are constants
_BLOCK = 256  # numbers of a scale


def bnb_optimizer(name: str, groups: Sequence[dict[str, Any]], **options: Any) -> Optimizer:
    """The optimizer of bitsandbytes that ``BNB`` has under this name, for groups of parameters.

    Raises:
        MissingPackageError: bitsandbytes is not installed. ConfigError: it has no code for the device of the parameters.
    """
    theirs, devices = BNB[name]
    parameters = [parameter for group in groups for parameter in group["params"]]
    device = next((parameter.device.type for parameter in parameters if parameter.device.type not in devices), None)
    if device:
        raise ConfigError(
            f"optimizer={name!r}: bitsandbytes has it for {' and '.join(devices)}, and the adapter is on {device}; adamw8 is for any device"
        )
    try:
        import bitsandbytes
        from bitsandbytes.cextension import lib
    except ImportError:
        raise MissingPackageError(
            f"optimizer={name!r} is bitsandbytes', which is not installed; run 'pip install bitsandbytes', or take adamw8"
        ) from None
    if any(parameter.is_cuda for parameter in parameters) and not getattr(lib, "compiled_with_cuda", False):
        raise ConfigError(
            f"optimizer={name!r}: this bitsandbytes has no code for the GPU here; install one that has, or take adamw8"
        )
    made: Optimizer = getattr(bitsandbytes.optim, theirs)(groups, **options)
    return made


# ---- for checkpoints


def bnb_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """What is kept of a parameter's state."""
    kept = {key: state[key] for key in _KEPT if key in state}
    return {key: torch.tensor(float(value)) if key == "step" else value for key, value in kept.items()}


def bnb_form(optimizer: Any, parameter: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of all that ``bnb_state`` has of a parameter."""
    settings = optimizer.args
    eight = settings.optim_bits == 8 and parameter.numel() >= settings.min_8bit_size
    form: dict[str, tuple[torch.Size, torch.dtype]] = {"step": (torch.Size(), torch.float32)}
    form |= dict.fromkeys(("state1", "state2"), (parameter.shape, torch.uint8 if eight else torch.float32))
    scales = torch.Size([-(-parameter.numel() // _BLOCK)]), torch.float32
    return form | (dict.fromkeys(("absmax1", "absmax2"), scales) if eight else {})


def put_bnb_state(optimizer: Any, parameter: nn.Parameter, kept: dict[str, Tensor]) -> None:
    """Put a kept state into place; where bitsandbytes pages it, into its pages, which its own ``load_state_dict`` would leave."""
    places = [(at, place) for at, group in enumerate(optimizer.param_groups) for place in range(len(group["params"]))]
    at, place = next((a, p) for a, p in places if optimizer.param_groups[a]["params"][p] is parameter)
    optimizer.init_state(optimizer.param_groups[at], parameter, at, place)
    for key, value in kept.items():
        if key == "step":
            optimizer.state[parameter][key] = int(value)
        else:
            optimizer.state[parameter][key].copy_(value)

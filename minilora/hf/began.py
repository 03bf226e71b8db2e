"""The model that preference training began with, from the very model that trains: no second one is in memory.

DPO, KTO, GRPO and RLOO compare what a model says now with what it said before its first step. An adapted model still knows that: without
its adapter, if this began as nothing, and with a frozen copy of it where training goes on from an adapter that had learnt something.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from minilora.errors import StateError
from minilora.lora.slots import has_adapters, unwrapped
from minilora.many.adapted import disabled, showing
from minilora.many.frozen import began_with, copy_values

__all__ = ["Reference", "reference"]


class Reference(nn.Module):
    """A module without tensors of its own; a call of it is a call of ``model`` as it was when this was made, without gradients.

    All else that it is asked for (``config``, ``device``, ``generate``'s settings, the output head) is the model's. It is in eval or
    train mode as the model is; its adapters have no dropout.

    Attributes:
        copies: the adapters that it shows (none for the bare model), each to the one that it is a frozen copy of, or to itself.
    """

    copies: dict[str, str]

    def __init__(self, model: nn.Module, copies: Mapping[str, str]) -> None:
        super().__init__()
        self.__dict__.update(policy=unwrapped(model), copies=dict(copies))

    def renew(self) -> None:
        """Take the frozen copies again, before a first step: in the dtype, too, that what trains has now."""
        for copied, name in self.copies.items():
            if copied != name:
                copy_values(self.policy, name, copied)

    def shown(self) -> AbstractContextManager[None]:
        """Inside the block the model itself is the reference, for every thread."""
        return showing(self.policy, list(self.copies)) if self.copies else disabled(self.policy)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call."""
        with self.shown():
            return self.policy(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same."""
        return self(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if "policy" not in self.__dict__:  # while a copy is made
            raise AttributeError(name)
        return getattr(self.__dict__["policy"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What TRL and accelerate bind as ``forward`` they have bound to the model already, whose call this is."""
        if name != "forward":
            super().__setattr__(name, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The model's as the reference shows it: by it TRL knows whether log-probabilities that it has kept are this one's."""
        with self.shown():
            return self.policy.state_dict(*args, **kwargs)


def reference(model: nn.Module) -> Reference:
    """What ``model`` computes now, for as long as it trains: ``DPOTrainer(model, ref_model=minilora.hf.reference(model), ...)``.

    An adapter that changes nothing yet is left out. Of one that does, and trains, a frozen copy stays in the model beside it, under the
    name "ref" ("ref_NAME" if its own is not "default"), and is saved with it. ``LoraTrainerMixin`` asks for this by itself.

    Raises:
        StateError: the model has no adapters, some are merged, or a copy from before is there still.
    """
    if not has_adapters(model):
        raise StateError(
            f"reference({type(model).__name__}): it has no adapters, so nothing of it stays as it is; give it to get_peft_model first"
        )
    return Reference(model, began_with(model))

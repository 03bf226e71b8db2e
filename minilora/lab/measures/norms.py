"""How far each layer has moved: the norm of its update, also step by step beside the norm of its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from minilora.errors import StateError
from minilora.lab.measures.subject import fixed_updates
from minilora.lora.adapter import Adapter
from minilora.lora.slot import own_parameters
from minilora.lora.update import update_norm, weight_norm

__all__ = ["Norms", "UpdateNorm", "update_norms"]


class UpdateNorm(NamedTuple):
    """``norm``: ``||dW||_F``. ``relative``: divided by ``||W||_F`` of the base weight."""

    norm: float
    relative: float


def update_norms(model: nn.Module, adapter_name: str = "default") -> dict[str, UpdateNorm]:
    """The Frobenius norm of each layer's update by path, from its factors where it has a low rank (``lora.update``).

    Raises:
        StateError: no such adapter, or an update that is another one for each input (aLoRA).
    """
    return {
        path: _measured(adapter, weight_norm(adapter)) for path, adapter in fixed_updates(model, adapter_name).items()
    }


def _measured(adapter: Adapter, whole: float) -> UpdateNorm:
    norm = update_norm(adapter)
    return UpdateNorm(norm, norm / max(whole, 1e-30))


class Norms:
    """The norms of updates and gradients by layer and step, as rows for a CSV file.

    Inside the block it sees each gradient as the optimizer gets it, after clipping, also where the loop forgets it before it is asked::

        with Norms(model) as norms:
            train(model, examples, config, folder, pad_id, watch=norms.watch)
        writer = csv.DictWriter(file, Norms.columns)
        writer.writeheader(), writer.writerows(norms.rows)

    In a loop of your own call ``record(step)`` instead, after ``optimizer.step()``.

    Attributes:
        rows: a dict with ``columns`` for each layer of each recorded step. ``update_norm`` and ``relative`` are those of ``update_norms``;
            ``grad_norm`` is the L2 norm of the gradients of the adapter's own parameters there, None where none was seen.

    Raises:
        StateError: as ``update_norms``; ``watch`` outside of the block, where the gradients are gone.
    """

    columns = ("step", "layer", "update_norm", "relative", "grad_norm")

    def __init__(self, model: nn.Module, adapter_name: str = "default") -> None:
        self.rows: list[dict[str, Any]] = []
        self._adapters = fixed_updates(model, adapter_name)
        self._whole = {path: weight_norm(adapter) for path, adapter in self._adapters.items()}
        self._own = {path: list(own_parameters(adapter)) for path, adapter in self._adapters.items()}
        self._seen: dict[str, float] = {}
        self._handle: Any = None

    def __enter__(self) -> Norms:
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._before_a_step)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self._handle, self._seen = None, {}

    def record(self, step: int) -> None:
        """Add a row for each layer: its update now, and its gradient at the last step of the optimizer, or as ``.grad`` holds it now."""
        gradients = self._seen or self._gradients()
        for path, adapter in self._adapters.items():
            norm, relative = _measured(adapter, self._whole[path])
            values = (step, path, norm, relative, gradients.get(path))
            self.rows.append(dict(zip(self.columns, values, strict=True)))
        self._seen = {}

    def watch(self, record: Mapping[str, Any]) -> None:
        """``record`` the step of what ``training.train`` logs; evaluations and steps that were skipped are passed over."""
        if self._handle is None:
            raise StateError("Norms.watch sees no gradients outside of its block; write: with Norms(model) as norms")
        if "loss" in record:
            self.record(record["step"])

    def _before_a_step(self, optimizer: Optimizer, *_: object) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) in held for parameters in self._own.values() for parameter in parameters):
            self._seen = self._gradients()

    def _gradients(self) -> dict[str, float]:
        """Path to the norm of the gradients there, where there are any."""
        held = {path: [p.grad for p in own if p.grad is not None] for path, own in self._own.items()}
        held = {path: gradients for path, gradients in held.items() if gradients}
        norms = [nn.utils.get_total_norm(gradients).float().cpu() for gradients in held.values()]
        return dict(zip(held, torch.stack(norms).tolist() if norms else [], strict=True))

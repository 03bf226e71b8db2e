"""Muon for the factors, AdamW for all else, as one optimizer (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/).

A step along a matrix of momentum is mostly a step along its few largest singular directions. Muon steps along all of them equally::

    M <- mean of the gradients        step = lr * 0.2 sqrt(max(rows, columns)) * U V^T,      M = U S V^T

``U V^T`` comes from five products of a Newton-Schulz iteration and no SVD; torch does them in bf16. The factor in front of it gives a
step the size that AdamW's has (Liu et al. 2025, arXiv 2502.16982, section 2.2), so one ``lr`` means the same to both parts. A number of a
factor needs 4 bytes of state, not 8. Next file: ``training/optim_lora_fa.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from minilora.errors import ConfigError, MissingPackageError
from minilora.training.optim_closure import loss_again

__all__ = ["MuonWithAdamW", "factors_for_muon", "refuse_without_muon"]

_MATRICES = ("lora_A", "lora_B", "lora_xs_R")


def refuse_without_muon() -> None:
    """Raise ``MissingPackageError`` where this torch is older than its Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise MissingPackageError(
            f"optimizer='muon' is torch.optim.Muon, which torch {torch.__version__} has not; run 'pip install -U torch', or take adamw"
        )


def factors_for_muon(named: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """Those parameters that are matrices between a layer's inputs and outputs.

    Biases, magnitudes and kernels are no matrices, and the factors of experts are many in one parameter: AdamW steps these. Rows of a table
    are looked up one by one, and say nothing of a matrix's directions.

    Raises:
        ConfigError: there is none.
    """
    found = [p for name, p in named.items() if p.ndim == 2 and any(part in _MATRICES for part in name.split("."))]
    if not found:
        raise ConfigError("optimizer='muon': no matrix lora_A or lora_B trains here, and Muon is for these; take adamw")
    return found


class MuonWithAdamW(Optimizer):
    """torch's Muon over some groups of parameters and torch's AdamW over others, with one state and one list of groups.

    Args:
        matrices: groups of 2-D parameters, for Muon. others: groups for AdamW; may be empty.
        lr, weight_decay: of groups that have none of their own; the decay is decoupled in both.

    Raises:
        MissingPackageError: this torch has no Muon.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        refuse_without_muon()
        groups = [{**group, "is_muon": True} for group in matrices] + [{**group, "is_muon": False} for group in others]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self._share()

    def _share(self) -> None:
        """Make the two optimizers over this one's groups and state: what is set or loaded here is theirs."""
        self.parts: list[Optimizer] = []
        for is_muon in (True, False):
            groups = [group for group in self.param_groups if group["is_muon"] is is_muon]
            if groups:
                part = torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw") if is_muon else AdamW(groups)
                part.state = self.state
                self.parts.append(part)
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of ``load_state_dict`` and of a copy: torch has put another state and other groups into place."""
        super().__setstate__(state)
        self._share()

    def is_muons(self, parameter: nn.Parameter) -> bool:
        """Whether Muon steps this parameter."""
        return any(group["is_muon"] and any(one is parameter for one in group["params"]) for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both. ``closure`` computes the loss again, once, which is returned."""
        loss = loss_again(closure)
        for part in self.parts:
            part.step()
        return loss

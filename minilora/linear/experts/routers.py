"""Which modules are routers: the small part of a mixture that chooses the experts of each token.

Most are a class of their own that reads a matrix ``weight [experts, in]``; some call a plain linear layer, in a class of their own or
straight in the block of the mixture. All are told by their names and by the experts beside them. An adapter reaches a router only where
somebody names it. Next file: ``linear/experts/forwards.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from minilora.linear.experts.known import known_experts

__all__ = ["is_named_router", "routers_among"]

_ENDINGS = ("Router", "Gate", "Gating")
_PLAIN = ("gate", "router")  # what a block calls its router where that is a linear layer


def is_named_router(module: nn.Module) -> bool:
    """Whether its class is called as routers are."""
    return type(module).__name__.endswith(_ENDINGS)


def routers_among(modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the routers of a model: what is called one and stands beside experts, in one module with them.

    Args:
        modules: every module of the model by its path.
    """
    blocks = {path.rpartition(".")[0] for path, module in modules.items() if _holds_experts(path, module)}
    found = set()
    for path, module in modules.items():
        block, _, name = path.rpartition(".")
        if path and block in blocks and (is_named_router(module) or (name in _PLAIN and not module._modules)):
            found.add(path)
    return found


def _holds_experts(path: str, module: nn.Module) -> bool:
    """Whether this is the experts' module of a mixture: one that is known, or a list or dictionary of single ones."""
    if known_experts(module) is not None:
        return True
    many = isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module) > 1
    return many and path.rpartition(".")[2] == "experts"

"""What experts compute, with projections that are layers: adapters, packed codes, or the module's own parameters.

``routed`` is what transformers' experts interface calls; the others are for classes of another shape, each equal to its class's own
``forward`` when nothing is adapted. On a CPU ``routed`` is one function (``whole.py``) where that can be. ``torch.compile`` leaves them
out of its graph: how many rows an expert gets is known only when they are there, and a graph would be made again for each batch. Next
file: ``linear/experts/hook.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minilora.linear.experts.known import projections
from minilora.linear.experts.routes import Routes, route
from minilora.linear.experts.whole import Gate, Projection, whole_experts
from minilora.linear.ops import is_transformed
from minilora.linear.packed import calls_only_forward

__all__ = ["apart", "dbrx", "jetmoe", "llama4", "longcat", "out_of_graphs", "routed", "shared"]


def project(home: Any, name: str, x: Tensor, routes: Routes) -> Tensor:
    """The projection ``name`` of sorted rows ``[S, in]``, with its bias: ``[S, out]``."""
    layer = home._modules.get(name)
    y: Tensor = (projections(home)[name] if layer is None else layer)(x, routes)
    bias = home._parameters.get(f"{name}_bias")
    return y if bias is None else y + routes.of_experts(bias).to(y.dtype)


def routed(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Each token through its k experts, weighted and summed: ``[T, H]`` to ``[T, H]``.

    Args:
        experts: up (with the gate), the gate's function, down; a norm behind each expert where it says so.
        top_k_index, top_k_weights: ``[T, k]``; an index beyond the last expert adds nothing.
    """
    routes = route(top_k_index, experts.num_experts)
    gated = getattr(experts, "has_gate", True)
    if (plain := _plainly(experts, gated, hidden_states)) is not None:
        return whole_experts(hidden_states, top_k_weights, routes, *plain).to(hidden_states.dtype)
    y = project(experts, "gate_up_proj" if gated else "up_proj", hidden_states[routes.tokens], routes)
    y = project(experts, "down_proj", experts._apply_gate(y) if gated else experts.act_fn(y), routes)
    if getattr(experts, "has_post_expert_norm", False):
        y = experts.post_expert_norm(y)
    return gathered(y, top_k_weights, routes, experts.num_experts).to(hidden_states.dtype)


def _plainly(experts: Any, gated: bool, x: Tensor) -> tuple[Projection, Projection, Gate] | None:
    """What ``whole_experts`` wants, if that may compute this module: nothing trains but factors, and no hook wants to see a projection."""
    names, act = ("gate_up_proj" if gated else "up_proj", "down_proj"), getattr(experts, "act_fn", None)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or is_transformed() or not isinstance(act, nn.Module):
        return None
    if getattr(experts, "has_post_expert_norm", False) or any(name not in names for name in experts._parameters):
        return None
    if next(act.parameters(), None) is not None or not calls_only_forward(act):
        return None
    dense = projections(experts)
    up, down = (_projection_of(experts._modules.get(name) or dense[name]) for name in names)
    if up is None or down is None:
        return None
    if not gated:
        return up, down, Gate(act)
    usual = getattr(type(experts)._apply_gate, "__name__", "") == "_default_apply_gate" and "_apply_gate" not in vars(
        experts
    )
    return up, down, Gate(experts._apply_gate, usual and type(act).__name__ in ("SiLU", "SiLUActivation"))


def _projection_of(layer: Any) -> Projection | None:
    """What a layer multiplies with, if calling it is nothing else."""
    own = getattr(type(layer), "as_projection", None)  # not what stands in front of one answers in its name
    found: Projection | None = own(layer) if own is not None and calls_only_forward(layer) else None
    return found


def gathered(y: Tensor, weights: Tensor, routes: Routes, experts: int) -> Tensor:
    """Sorted rows ``[S, H]`` times their weights ``[T, k]``, summed for each token: ``[T, H]``, in the wider of both dtypes."""
    weighted = y * weights.reshape(-1)[routes.order].unsqueeze(1)
    weighted = weighted.masked_fill((routes.ids >= experts).unsqueeze(1), 0)
    back = torch.empty_like(routes.order)
    back[routes.order] = torch.arange(len(back), device=back.device)
    return weighted[back].view(*weights.shape, -1).sum(1)


def longcat(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``routed``, where the indices from ``num_routed_experts`` on are experts that return the token itself."""
    count = experts.num_routed_experts
    routes = route(top_k_index, count)
    x = hidden_states[routes.tokens]
    gate, up = project(experts, "gate_up_proj", x, routes).chunk(2, dim=-1)
    y = project(experts, "down_proj", experts.act_fn(gate) * up, routes)
    y = torch.where((routes.ids >= count).unsqueeze(1), x, y)
    return gathered(y, top_k_weights, routes, experts.total_experts).to(hidden_states.dtype)


def dbrx(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """DBRX: gate (w1) and up (v1) apart, ``[B, T, H]``."""
    mlp, flat = experts.mlp, hidden_states.reshape(-1, experts.hidden_size)
    routes = route(top_k_index, experts.num_experts)
    x = flat[routes.tokens]
    y = mlp.activation_fn(project(mlp, "w1", x, routes)) * project(mlp, "v1", x, routes)
    y = gathered(project(mlp, "w2", y, routes), top_k_weights, routes, experts.num_experts)
    return y.to(flat.dtype).view(len(hidden_states), -1, experts.hidden_size)


def jetmoe(experts: Any, inputs: Tensor, expert_size: Any) -> Tensor:
    """JetMoE: one projection of rows that are sorted already, ``expert_size`` of them for each expert."""
    sizes = torch.as_tensor(expert_size, device=inputs.device)
    ids = torch.arange(len(sizes), device=inputs.device).repeat_interleave(sizes)
    return project(
        experts,
        "weight",
        inputs,
        Routes(torch.arange(len(ids), device=ids.device), ids, sizes.cumsum(0).int(), batch=0),
    )


def llama4(experts: Any, hidden_states: Tensor) -> Tensor:
    """Llama 4: every expert gets every token, ``[E * T, H]``, times its score, which is 0 where the router did not choose it.

    A row of zeros gives a row of zeros (the gate's function of 0 is multiplied by an up of 0), so only the others are computed.
    """
    count = experts.num_experts
    rows = hidden_states.view(-1, experts.hidden_size)
    live = rows.detach().any(1).nonzero().flatten()
    tokens = len(rows) // count
    found = route((live // tokens).unsqueeze(1), count)
    routes = replace(found, places=(live % tokens)[found.order], batch=tokens)
    x = rows[live]
    gate, up = project(experts, "gate_up_proj", x, routes).chunk(2, dim=-1)
    y = project(experts, "down_proj", up * experts.act_fn(gate), routes)
    return torch.zeros_like(rows).index_copy(0, live, y)


def shared(experts: Any, hidden_states: Tensor, gammas: Tensor) -> Tensor:
    """Inkling's shared experts: every token through all of them, weighted by ``gammas`` before the last projection."""
    count, flat = experts.n_shared_experts, hidden_states.reshape(-1, hidden_states.shape[-1])
    found = route(torch.arange(count, device=flat.device).repeat_interleave(len(flat)).unsqueeze(1), count)
    routes = replace(found, places=found.order % max(1, len(flat)), batch=len(flat))
    x, weights = flat.repeat(count, 1), gammas.reshape(-1, count).t().reshape(-1, 1)
    y = experts.act_fn(project(experts, "gate_proj", x, routes)) * project(experts, "up_proj", x, routes) * weights
    y = project(experts, "down_proj", y, routes)
    return y.view(count, *flat.shape).float().sum(0).to(hidden_states.dtype).view(hidden_states.shape)


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    each.__name__: each for each in (dbrx, jetmoe, llama4, longcat, routed, shared)
}


def apart(name: str, *args: Any, **kwargs: Any) -> Tensor:
    """Call a function of this file by its name, as ``out_of_graphs`` left it."""
    return _FUNCTIONS[name](*args, **kwargs)


def out_of_graphs() -> None:
    """Let ``torch.compile`` step over all of them, where its machinery is loaded (transformers' models load it)."""
    if "torch._dynamo" in sys.modules:
        for name, each in _FUNCTIONS.items():
            if not hasattr(each, "_torchdynamo_disable"):
                _FUNCTIONS[name] = torch.compiler.disable(each)

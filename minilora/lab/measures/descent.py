"""Whether an update goes where the gradient of the whole weight pointed at the start.

    alignment = <dW, -G> / (||dW||_F ||G||_F),        G = dL/dW at the base model, [out, in]

L is the mean cross-entropy of the supervised tokens, computed without any adapter; ``dW`` is the update as it is now. 1: the update is one
step of gradient descent on the whole weight, up to its length. 0: it is orthogonal to that step.

The base weight is frozen and may be packed, so it has no gradient of its own: ``G`` is the sum over the tokens of ``dL/dy x^T``, with
x what goes into the layer and ``dL/dy`` the gradient of what comes out, both from hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data.batches import collate
from minilora.data.encoding import Encoded
from minilora.errors import StateError, TargetError
from minilora.files import validate
from minilora.lab.measures.subject import batched, fixed_updates, measured
from minilora.linear.layers import is_linear
from minilora.lora.change import Change
from minilora.lora.slots import Adapters, unwrapped
from minilora.training.guards import check_examples
from minilora.training.losses import token_losses

__all__ = ["alignment"]


def alignment(
    model: nn.Module,
    examples: Sequence[Encoded],
    adapter_name: str = "default",
    *,
    batch_size: int = 8,
    layers_at_a_time: int = 1,
) -> dict[str, float]:
    """By path, the cosine of each linear layer's update and minus the gradient of its whole weight at the base model.

    Embeddings, convolutions and attentions are left out. NaN where the update or the gradient is zero.

    Args:
        examples: what the loss is computed on, such as the training data.
        layers_at_a_time: how many gradients ``[out, in]``, in fp32, are held at once. All examples go through the model, forward and
            backward, once for each so many layers.

    Raises:
        DataError: examples that cannot be used. TargetError: no linear layer is adapted. StateError: as ``subject.measured``; an update
            that is another one for each input; or a layer that the loss does not depend on, or whose weight is read and not called.
    """
    validate.whole("batch_size", batch_size, 1)
    validate.whole("layers_at_a_time", layers_at_a_time, 1)
    updates = fixed_updates(model, adapter_name)
    paths = [path for path, adapter in updates.items() if is_linear(adapter.innermost)]
    if not paths:
        raise TargetError(f"adapter {adapter_name!r} updates no linear layer; wanted one, whose gradient is measured")
    check_examples(model, examples, 0, "alignment")
    found = {}
    with measured(model, adapter_name) as record:
        for at in range(0, len(paths), layers_at_a_time):
            some = paths[at : at + layers_at_a_time]
            for path, gradient in _weight_gradients(model, record, some, examples, batch_size).items():
                found[path] = _cosine(updates[path], gradient)
    return {path: found[path] for path in paths}


@torch.no_grad()
def _cosine(adapter: Any, gradient: Tensor) -> float:
    update = adapter.delta_weight().to(gradient)
    sizes = float(update.norm()), float(gradient.norm())
    if not all(sizes):
        return float("nan")
    return float(-((update / sizes[0]) * (gradient / sizes[1])).sum())  # divided first: a product of small numbers is 0


def _weight_gradients(
    model: nn.Module, record: Adapters, paths: Sequence[str], examples: Sequence[Encoded], batch_size: int
) -> dict[str, Tensor]:
    """``G [out, in]`` of these layers by path, in fp32 or wider. The gradients of parameters are not touched."""
    sums: dict[str, Tensor] = {}
    supervised = sum(example.supervised for example in examples)
    change, handles = Change(), []
    try:
        with record.bare():
            for parameter in unwrapped(model).parameters():
                change.put(parameter, "requires_grad", False)
            for path in paths:
                called: Any = record.slots[path].parent._modules[
                    record.slots[path].attr
                ]  # the face, where there is one
                handles.append(called.register_forward_hook(_listener(path, sums)))
            for batch in batched(examples, batch_size):
                with torch.enable_grad():
                    loss = token_losses(model, collate(batch, 0)).sum() / supervised  # a sum might overflow fp16
                if loss.requires_grad:
                    loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        change.take_back()
    if silent := [path for path in paths if path not in sums]:
        raise StateError(
            f"{silent[0]}: no gradient arrives, so the loss does not depend on its output, or its weight is read and the layer not called; "
            "leave it out of the adapter (exclude_modules)"
        )
    return sums


def _listener(path: str, sums: dict[str, Tensor]) -> Callable[..., Tensor]:
    """A forward hook that adds ``dL/dy x^T`` of each call of a layer to ``sums[path]``, when the gradient comes."""

    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0].detach().flatten(0, -2)

        def add(gradient: Tensor) -> None:
            kind = torch.promote_types(gradient.dtype, torch.float32)
            part = gradient.detach().flatten(0, -2).to(kind).T @ x.to(kind)
            sums[path] = sums[path].add_(part) if path in sums else part

        if not output.requires_grad:  # nothing before it trains, so the graph begins here
            output = output.detach().requires_grad_()
        output.register_hook(add)
        return output.clone()  # a copy may be written to, as an activation in place does

    return hook

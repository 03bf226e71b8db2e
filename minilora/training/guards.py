"""What is looked at so that no run trains nothing, trains on nonsense, or lets one bad number spread.

``check_parameters`` and ``check_examples`` look before anything is computed, the others while a run goes on. A loop of your own can call
them too: ``check_parameters(model, optimizer)`` finds an optimizer that was made before the adapter. Next file: ``training/signals.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data.encoding import Encoded
from minilora.data.examples import Examples
from minilora.data.tokens import IGNORED
from minilora.errors import DataError, StateError
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.slot import own_parameters
from minilora.lora.slots import Adapters, adapters_of, has_adapters
from minilora.quant.finite import is_finite

__all__ = [
    "check_examples",
    "check_parameters",
    "context_length",
    "first_nonfinite_gradient",
    "first_nonfinite_output",
    "refuse_nonfinite",
]


# ---- before the first step


def check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, nn.Parameter]:
    """The parameters that a run trains, by name: exactly those of the one active adapter, each in its layer and in the optimizer.

    Args:
        model: with adapters. optimizer: of a loop of your own, made already.

    Raises:
        StateError: something would not train, or train and not be saved; the message names it.
    """
    if has_adapters(model) and (merged := adapters_of(model).merged):
        raise StateError(f"adapters {list(merged)} are merged, so they would not train; call unmerge first")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise StateError(
            "no parameter requires grad, so nothing would train; inject an adapter, or load it with is_trainable=True"
        )
    own = _own(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for path, parameter in own:
        if id(parameter) not in names:
            raise StateError(f"{path}: its adapter is not in the model any more; change layers first, and inject then")
        if not parameter.requires_grad:
            raise StateError(
                f"{names[id(parameter)]} does not require grad, so it would stay as it is; call set_adapter(model, name) again"
            )
    wanted = {id(parameter) for _, parameter in own}
    for name, parameter in trainable.items():
        if id(parameter) not in wanted:
            raise StateError(
                f"{name} requires grad and belongs to no active adapter, so it would train and not be saved; freeze it, "
                "or name its module in modules_to_save"
            )
    if optimizer is not None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if absent := [name for name, parameter in trainable.items() if id(parameter) not in held]:
            raise StateError(
                f"{absent[0]} is not in the optimizer ({len(absent)} of {len(trainable)} are not); inject the adapter first, "
                "and make the optimizer from its parameters then"
            )
    return trainable


def _own(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """``(slot's path, parameter)`` of all that the active adapter trains."""
    if not has_adapters(model):
        raise StateError("the model has no adapter, so nothing would be saved; inject one, or use a loop of your own")
    adapters = adapters_of(model)
    name = _the_active(adapters)
    own = [(path, p) for path, value in adapters.named(name).items() for p in own_parameters(value)]
    if not any(isinstance(value, Adapter) for value in adapters.named(name).values()) and not own:
        raise StateError(f"adapter {name!r} has no parameter, so nothing would train; give it a target")
    return own


def _the_active(adapters: Adapters) -> str:
    if len(adapters.active) != 1:
        raise StateError(
            f"the active adapters are {list(adapters.active)}; wanted one to train and to save; set_adapter(model, name) first"
        )
    return adapters.active[0]


def check_examples(model: nn.Module, examples: Sequence[Encoded], pad_id: int, what: str = "training") -> None:
    """Look at every example before the first step.

    Raises:
        DataError: there is none, or one with nothing to learn, longer than the model's context, or with a token that the embedding
            does not have; by its place.
    """
    if not examples:
        raise DataError(f"no example for {what}; give one at least")
    rows, context = _rows(model), context_length(model)
    if rows is not None and not (isinstance(pad_id, int) and 0 <= pad_id < rows):
        raise DataError(f"pad_id={pad_id}: the embedding has {rows} rows; wanted one of them")
    looked = examples.suspects(context, rows) if isinstance(examples, Examples) else enumerate(examples, 1)
    for number, example in looked:
        where = example.where or f"{what} example {number}"
        if not example.supervised:
            raise DataError(f"{where}: every label is {IGNORED}, so there is nothing to learn; leave it out")
        if context is not None and len(example.input_ids) > context:
            raise DataError(
                f"{where}: {len(example.input_ids)} tokens, the model's context has {context}; encode with max_length={context}"
            )
        if rows is not None:
            _check_tokens(example, rows, where)


def _check_tokens(example: Encoded, rows: int, where: str) -> None:
    learnt = tuple(label for label in example.labels if label != IGNORED)
    for what, tokens in (("token", example.input_ids), ("label", learnt)):
        if tokens and not (min(tokens) >= 0 and max(tokens) < rows):
            at, bad = next((i, token) for i, token in enumerate(tokens, 1) if not 0 <= token < rows)
            raise DataError(
                f"{where}: {what} {at} has id {bad}, the embedding has rows 0 to {rows - 1}; this tokenizer is another model's"
            )


def _rows(model: nn.Module) -> int | None:
    """Tokens that the input embedding knows, where the model says which one that is."""
    table: Any = Bare(model).get_input_embeddings()
    return getattr(table, "num_embeddings", None)


def context_length(model: nn.Module) -> int | None:
    """Tokens that the model was made for, or None where its config does not say."""
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


# ---- while it runs


def first_nonfinite_gradient(named: Iterable[tuple[str, nn.Parameter]]) -> str | None:
    """The first of these parameters whose gradient holds NaN or infinity."""
    for name, parameter in named:
        if parameter.grad is not None and not is_finite(parameter.grad):
            return name
    return None


@torch.no_grad()
def first_nonfinite_output(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Which module is the first to return NaN or infinity while ``run()`` calls the model again."""
    found: list[str] = []

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            bad = (isinstance(t, Tensor) and not is_finite(t) for t in tensors)
            if not found and any(bad):
                found.append(path)

        return hook

    hooks = [module.register_forward_hook(watch(path)) for path, module in model.named_modules() if path]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def refuse_nonfinite(named: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Raise ``StateError`` for the first tensor with NaN or infinity in it; ``what`` is what it must not get into."""
    for name, tensor in named:
        if not is_finite(tensor):
            raise StateError(f"{name} holds NaN or infinity, so {what} is not written; find what wrote it first")

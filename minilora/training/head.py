"""Asking a model for logits, and whether its output head can become the loss instead.

For one call of the model its head returns a loss for each supervised token in the place of logits; everything around it (hooks,
wrappers, the model's own forward) stays as it is. That is right for a frozen linear layer whose output is the model's output. Most
models are so; Gemma 2 caps its logits after the head, Granite scales them. Each model is asked once: its head returns numbers that
were drawn, for two tokens, and they must come out of the model as they are. Where they do not, or the head is no such layer, all
logits are computed. Next file: ``training/losses.py``.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minilora.linear.layers import calls_only_forward, is_plain
from minilora.lora.slots import unwrapped
from minilora.training.chunked import head_losses

__all__ = ["NO_HEAD", "ask", "ask_for_hidden", "ask_for_losses", "why_all_logits"]

NO_HEAD = "the model names no output head"
_known: weakref.WeakKeyDictionary[nn.Module, tuple[int, bool]] = weakref.WeakKeyDictionary()
_LARGE = 100.0  # of the drawn logits: no cap leaves such as they are


def ask(model: nn.Module, batch: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    """``logits [batch, wanted, vocabulary]`` at the positions in ``wanted``; no others are computed if the model can leave them out.

    Args:
        batch: what the model is called with, on its device; ``labels`` are not handed on.
    """
    options: dict[str, Any] = {name: value for name, value in batch.items() if name != "labels"}
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted:
        options["use_cache"] = False
    if "logits_to_keep" in accepted:
        return model(**options, logits_to_keep=wanted).logits
    return model(**options).logits[:, wanted]


def ask_for_losses(model: nn.Module, batch: Mapping[str, Tensor], wanted: Tensor, counts: Tensor) -> Tensor:
    """The losses ``[tokens]`` of a model for which ``why_all_logits`` is None.

    Args:
        wanted: positions of which a token counts. counts: which do, ``[batch, wanted]``.
    """
    head, targets = _head(model), batch["labels"][:, 1:]

    def losses(hidden: Tensor) -> Tensor:
        rows, length = hidden.shape[:2]
        all_positions = length != len(wanted)  # the model cannot leave any out
        own = torch.zeros(rows, length, dtype=torch.bool, device=counts.device)
        own[:, wanted if all_positions else slice(None)] = counts
        places = own.flatten().nonzero().squeeze(1)
        found = head_losses(hidden.flatten(0, 1)[places], targets[:, wanted][counts], head)
        return found.new_zeros(rows * length).index_put((places,), found).view(rows, length, 1)

    with _in_the_place_of(head, losses):
        return ask(model, batch, wanted)[counts].squeeze(1)


def ask_for_hidden(model: nn.Module, batch: Mapping[str, Tensor], wanted: Tensor) -> tuple[Tensor, nn.Linear]:
    """What goes into the head at the positions in ``wanted``, ``[batch, wanted, in]`` in the head's dtype, and the head.

    For a model for which ``why_all_logits`` is None: its logits are ``head(hidden)``.
    """
    head = _head(model)
    with _in_the_place_of(head, lambda hidden: hidden):
        return ask(model, batch, wanted).to(head.weight.dtype), head


def why_all_logits(model: nn.Module) -> str | None:
    """Why the head of a model cannot become the loss, in words; None if it can. The first question runs the model on two tokens."""
    head = _head(model)
    if head is None:
        return NO_HEAD
    if not (isinstance(head, nn.Linear) and is_plain(head)):
        return f"its head is a {type(head).__name__}, and no plain linear layer"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "its head trains"
    if not calls_only_forward(head):
        return "its head has hooks, which look for logits"
    if torch.is_autocast_enabled(head.weight.device.type):
        return "autocast chooses the dtype of its head"
    if model not in _known or _known[model][0] != id(head):
        _known[model] = (id(head), _comes_out(model, head))
    return None if _known[model][1] else "what its head returns is changed after it, or not used"


def _head(model: nn.Module) -> Any:
    """What the model calls as its head, or None; transformers' models without one raise ``NotImplementedError``."""
    try:
        return getattr(unwrapped(model), "get_output_embeddings", lambda: None)()
    except NotImplementedError:
        return None


@torch.no_grad()
def _comes_out(model: nn.Module, head: nn.Linear) -> bool:
    """Whether what the head returns is what the model returns, to the bit and in fp32."""
    drawn: list[Tensor] = []

    def draw(hidden: Tensor) -> Tensor:
        numbers = torch.randn(*hidden.shape[:-1], head.out_features, generator=torch.Generator().manual_seed(0))
        drawn.append((_LARGE * numbers).to(hidden.device))
        return drawn[-1]

    tokens = torch.arange(2, device=head.weight.device)
    batch = {"input_ids": tokens[None] % head.out_features, "attention_mask": torch.ones_like(tokens)[None]}
    with _in_the_place_of(head, draw), torch.random.fork_rng():
        found = ask(model, batch, tokens)
    return len(drawn) == 1 and found.dtype == torch.float32 and torch.equal(found, drawn[0])


@contextmanager
def _in_the_place_of(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    head.forward = forward
    try:
        yield
    finally:
        del head.forward

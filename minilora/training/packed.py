"""Whether a run packs its examples: only where the model reads packed examples as it reads them apart.

Before the first step examples of the data are read both ways. They must have the same losses, token by token; and exchanging the first
example of a row must leave the others in it as they are. The second look is the sharper one in bf16, where the first must allow for
rounding. A row of the run that is longer than the model's context is read both ways too. What fails has a model that looks over the
border of an example, or that counts positions by itself (OPT, Bloom, MPT, most state space models): it is refused by name, or left
unpacked. Next file: ``training/optim.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from minilora.data.batches import Collate, collate
from minilora.data.encoding import Encoded
from minilora.data.packing import (
    Row,
    collate_one_row,
    collate_packed,
    collate_rows,
    one_row,
    pack,
    saving,
    with_longest_row,
)
from minilora.errors import StateError
from minilora.lora.adapter import Adapter
from minilora.training.guards import context_length
from minilora.training.probe import CANNOT, LENGTH, leak_between, learnt, losses_of, rounding
from minilora.training.settings import TrainConfig

__all__ = ["choose_collate", "why_not_packed"]

PAYS = 1.25  # times as many tokens unpacked: below it, what packed attention costs more outweighs the padding saved


def choose_collate(
    model: nn.Module, examples: Sequence[Encoded], config: TrainConfig, pad_id: int, say: Callable[[str], None]
) -> Collate:
    """What makes the batches of a run: ``collate``, or one of the packing ones, as ``config.pack`` says; ``say`` gets a line on it.

    Raises:
        StateError: ``pack`` is "on", and the model or its adapter does not read packed examples as it does apart; by name.
    """
    if config.pack == "off":
        return collate
    found = saving(examples, config.batch_size, config.seed)
    if config.pack == "auto" and found.times < PAYS:
        return collate
    for packing in (collate_packed, collate_one_row):
        longest = _beyond_context(model, examples, config, one_row if packing is collate_one_row else pack)
        if not (why := why_not_packed(model, examples, pad_id, packing, longest)):
            say(
                f"examples are packed: {found.packed:.1%} of the tokens computed are padding instead of {found.padding:.1%}, "
                f"{found.times:.2f} times fewer tokens in all (--pack off leaves each its row)"
            )
            return packing
    if config.pack == "on":
        raise StateError(f"pack='on': {why}; leave pack at 'auto', or set it to 'off'")
    say(f"examples are not packed, though {found.padding:.1%} of the tokens computed are padding: {why}")
    return collate


def why_not_packed(
    model: nn.Module, examples: Sequence[Encoded], pad_id: int, packing: Collate, longest: Sequence[Row] = ()
) -> str | None:
    """Why ``packing`` would change what the model learns, in words; None if it would not. ``longest``: rows that the run has."""
    name = type(model).__name__
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{name} takes no position_ids, so it cannot tell where an example ends"
    if any(isinstance(module, Adapter) and module.depends_on_input for module in model.modules()):
        return "the adapter looks for its tokens in a whole row"
    if apart := _how_apart(model, examples, pad_id, packing) or _how_apart_as_they_are(model, pad_id, longest):
        return f"{name} does not read packed examples as it reads them apart ({apart})"
    return None


def _how_apart(model: nn.Module, examples: Sequence[Encoded], pad_id: int, packing: Collate) -> str | None:
    """How the losses of three examples differ when they are packed, in words; None if they do not. The model is left as it was."""
    first, second, third = (_cut(examples[number % len(examples)], LENGTH) for number in range(3))
    third = _cut(third, len(first.input_ids) + len(second.input_ids) - 1)  # so that its row has padding
    highest = max(max(example.input_ids) for example in (first, second, third))
    other = learnt([highest - token for token in first.input_ids])

    def rows(first: Encoded) -> list[Row]:
        return [[first, second, third]] if packing is collate_one_row else [[first, second], [third]]

    batches = [
        collate_rows(rows(first), pad_id),
        collate_rows(rows(other), pad_id),
        collate([first, second, third], pad_id),
    ]
    sizes = [len(example.input_ids) - 1 for example in (first, second, third)]
    try:
        packed, exchanged, apart = (losses.split(sizes) for losses in losses_of(model, batches))
    except CANNOT as error:
        return f"it fails: {' '.join(str(error).split())[:100]}"
    eps, scale = rounding(model), max(1.0, max(float(losses.max()) for losses in apart))
    for number, (one, changed, alone) in enumerate(zip(packed, exchanged, apart, strict=True)):
        if number and (leak := leak_between(model, one, changed)):
            return f"another example in the row changes a loss by {leak:.2g}"
        if not (difference := _largest(one - alone)) <= eps**0.5 * scale:
            return f"a loss differs by {difference:.2g}"
    return None


def _how_apart_as_they_are(model: nn.Module, pad_id: int, rows: Sequence[Row]) -> str | None:
    """The same of whole rows: a model may have a table of masks or of positions that ends before a row does (GPT-Neo)."""
    if not rows:
        return None
    try:
        packed, apart = losses_of(
            model, [collate_rows(rows, pad_id), collate([example for row in rows for example in row], pad_id)]
        )
    except CANNOT as error:
        return f"it fails: {' '.join(str(error).split())[:100]}"
    difference = _largest(packed - apart)
    near = difference <= rounding(model) ** 0.5 * max(1.0, float(apart.max()))
    return None if near else f"a loss differs by {difference:.2g}"


def _beyond_context(
    model: nn.Module, examples: Sequence[Encoded], config: TrainConfig, rows: Callable[[Sequence[Encoded]], list[Row]]
) -> Sequence[Row]:
    """Rows of the run, the longest among them, if it is longer than the model's context; else none."""
    longest = with_longest_row(examples, config.batch_size, config.seed, rows)
    length = max(sum(len(example.input_ids) for example in row) for row in longest)
    return longest if length > (context_length(model) or length) else ()


def _cut(example: Encoded, length: int) -> Encoded:
    return learnt(example.input_ids[:length])


def _largest(differences: Tensor) -> float:
    return float(differences.abs().max())

"""A few examples of a job token by token, as the report and ``minilora look`` show them: which ones, and what the model makes of them.

A run asks before its first step and after its last, of the model that is trained, as it asks its prompts: before, the adapter is as it
begins. It draws nothing, changes nothing, and what fails here ends no run. Next file: ``job/described.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minilora.data.encoding import Encoded
from minilora.data.examples import Examples
from minilora.data.lens import Lens, lens_of, seen_alone
from minilora.data.records import Record, Source, records_of
from minilora.data.store import Way
from minilora.errors import MiniLoraError
from minilora.training.guards import check_examples
from minilora.training.losses import losses_by_token
from minilora.training.probe import CANNOT

__all__ = ["HELD", "LEARNT", "Losses", "Shown", "chosen", "lenses_of", "losses_or_none", "pictured"]

LEARNT, HELD = "learnt from", "held out"
Losses = Sequence[Sequence[float | None]]  # of each example, of each token
_EACH = 2  # examples that are learnt from, and as many that are held out


class Shown:
    """The examples that the report of a run shows, four at most, and what the model made of them.

    Args:
        examples, evaluation: to learn from, and held out. pad_id: padding token.
    """

    def __init__(self, examples: Sequence[Encoded], evaluation: Sequence[Encoded], pad_id: int) -> None:
        held = chosen(evaluation, _EACH)
        learnt = chosen(examples, 2 * _EACH - len(held))
        self.examples, self.pad_id = [*learnt, *held], pad_id
        self.kinds = [LEARNT] * len(learnt) + [HELD] * len(held)
        self._losses: dict[str, Losses] = {}

    def ask(self, model: Any, when: str) -> None:
        """Compute the losses "before" or "after". A run that goes on asks before its checkpoint is loaded, as it began."""
        self._losses[when] = losses_or_none(model, self.examples, self.pad_id)

    def pictured(self, sources: Sequence[Source], tokenizer: Any, way: Way) -> list[dict[str, Any]]:
        """As ``report/lens.py`` draws them."""
        lenses = lenses_of(self.examples, sources, tokenizer, way)
        return pictured(lenses, self.kinds, *(self._losses.get(when, ()) for when in ("before", "after")))


def chosen(examples: Sequence[Encoded], count: int, longest: bool = False) -> list[Encoded]:
    """The first examples, or the longest ones, the longest first; one that comes again is taken once."""
    found: list[Encoded] = []
    for at in _by_length(examples) if longest else range(len(examples)):
        if len(found) == count:
            break
        if examples[at] not in found:
            found.append(examples[at])
    return found


def _by_length(examples: Sequence[Encoded]) -> list[int]:
    if isinstance(examples, Examples):
        return [int(at) for at in np.argsort(-examples.rows["length"], kind="stable")]
    return sorted(range(len(examples)), key=lambda at: -len(examples[at].input_ids))


def losses_or_none(model: Any, examples: Sequence[Encoded], pad_id: int) -> Losses:
    """The loss of each token; nothing where the model cannot be asked, for the first step says why."""
    try:
        check_examples(model, examples, pad_id)  # on a GPU an id that is too large would end the process
        return losses_by_token(model, examples, pad_id)
    except (MiniLoraError, *CANNOT):
        return ()


def lenses_of(examples: Sequence[Encoded], sources: Sequence[Source], tokenizer: Any, way: Way) -> list[Lens]:
    """The lens of each example; of one whose record cannot be read again it shows the tokens alone, and says why."""
    found: dict[str, Record] = {}
    why = "the file is another one by now"
    try:
        found = _records({example.where for example in examples}, sources, way)
    except MiniLoraError as error:
        why = str(error)
    return [_lens(example, found.get(example.where), tokenizer, way, why) for example in examples]


def _lens(example: Encoded, record: Record | None, tokenizer: Any, way: Way, why: str) -> Lens:
    try:
        lens = record and lens_of(example, record, tokenizer, way.max_length, way.truncate)
    except MiniLoraError as error:
        lens, why = None, str(error)
    return lens or seen_alone(
        example, tokenizer, f"roles and cuts are not known, for its line cannot be read again: {why}"
    )


def _records(wanted: set[str], sources: Sequence[Source], way: Way) -> dict[str, Record]:
    """The records of these places; nothing is read behind the last of them."""
    found: dict[str, Record] = {}
    for record in (record for source in sources for record in records_of(source, way.reading)):
        where = getattr(record, "where", "")
        if where in wanted:
            found[where] = record
            if len(found) == len(wanted):
                break
    return found


def pictured(lenses: Sequence[Lens], kinds: Sequence[str], before: Losses, after: Losses) -> list[dict[str, Any]]:
    """Each lens with what it is for and its losses, as ``report/lens.py`` draws it.

    Args:
        before, after: of each example, of each token; empty where they were not computed.
    """
    found = []
    for at, (lens, kind) in enumerate(zip(lenses, kinds, strict=True)):
        told: dict[str, Any] = {name: getattr(lens, name) for name in ("first", "number", "count", "warning")}
        told |= {"where": lens.example.where, "kind": kind, "tokens": [vars(token) for token in lens.tokens]}
        found.append(
            told
            | {name: _spread(lens, each[at] if each else ()) for name, each in (("before", before), ("after", after))}
        )
    return found


def _spread(lens: Lens, losses: Sequence[float | None]) -> list[float | None]:
    """A loss for each token that is shown: those that were cut have none."""
    own = iter(losses)
    return [None if token.cut else next(own) for token in lens.tokens] if losses else []

"""Examples of a job that is not run: chosen as training would have them, and what a model makes of each token.

Next file: ``job/lens.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minilora.data.encoding import Encoded
from minilora.data.store import Way
from minilora.errors import DataError
from minilora.hf.dates import dated
from minilora.hf.devices import choose
from minilora.hf.load import load_tokenizer, skeleton
from minilora.job.examples import Looked, looked_at, parted, way_of
from minilora.job.lens import HELD, LEARNT, Losses, chosen, lenses_of, pictured
from minilora.job.record import Record
from minilora.job.sessions import data_files
from minilora.job.settings import Job
from minilora.training.guards import check_examples, context_length
from minilora.training.losses import losses_by_token

__all__ = ["Picked", "pick"]


@dataclass(frozen=True)
class Picked:
    """Examples that were chosen, with all that shows them."""

    examples: Sequence[Encoded]
    kind: str
    looked: Looked
    tokenizer: Any
    way: Way

    def losses(self, model: Any) -> Losses:
        """The loss of each token of each example. Raises ``DataError`` for tokens that the model cannot take."""
        check_examples(model, self.examples, self.tokenizer.pad_token_id)
        return losses_by_token(model, self.examples, self.tokenizer.pad_token_id)

    def pictured(self, before: Losses, after: Losses) -> list[dict[str, Any]]:
        """As ``report/lens.py`` draws them."""
        sources = (*self.looked.learn, *self.looked.held)
        lenses = lenses_of(self.examples, sources, self.tokenizer, self.way)
        return pictured(lenses, [self.kind] * len(lenses), before, after)

    def strange(self, record: Record) -> str:
        """The first file that is not as the run was trained on it; "" if all are."""
        known = {(file.sha256, file.purpose) for file in record.data}
        here = data_files(self.looked.learn, self.looked.held)
        return next((file.path for file in here if (file.sha256, file.purpose) not in known), "")


def pick(job: Job, count: int, longest: bool, held: bool, say: Callable[[str], None]) -> Picked:
    """Encode the data of a job, and choose ``count`` examples of those that are learnt from, or held out.

    Raises:
        DataError: bad data, or nothing is held out. CheckpointError, ConfigError: as ``fine_tune``, of its model and its settings.
    """
    place = choose(job.device, job.dtype, job.attention)
    looked = looked_at(job, say)
    paper = skeleton(job.model, place.dtype, job.trust_remote_code)
    tokenizer = dated(load_tokenizer(job.model, job.trust_remote_code), job.date)
    context = context_length(paper)
    examples, evaluation = parted(job, looked, tokenizer, context, say)
    if held and not evaluation:
        raise DataError("--held: nothing is held out; give --eval-share above 0, or --eval-data")
    some = chosen(evaluation if held else examples, count, longest)
    return Picked(some, HELD if held else LEARNT, looked, tokenizer, way_of(job, tokenizer, context))

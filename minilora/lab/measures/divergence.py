"""How far an adapter has moved what the model says about other text: the KL divergence from the base model to the adapted one.

    KL(base || adapted) = sum over the vocabulary of  p_base * (log p_base - log p_adapted)        nats, of one token's prediction

It is 0 where nothing has changed, and at least 0 otherwise, where the difference of two losses may have either sign.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minilora.data.batches import collate
from minilora.data.encoding import Encoded
from minilora.data.tokens import IGNORED
from minilora.errors import DataError
from minilora.files import validate
from minilora.lab.measures.subject import batched, measured
from minilora.lora.slots import Adapters
from minilora.training.chunked import cross_entropy
from minilora.training.guards import check_examples
from minilora.training.head import ask, ask_for_hidden, why_all_logits
from minilora.training.probe import learnt

__all__ = ["Forgetting", "forgetting"]


@dataclass(frozen=True)
class Forgetting:
    """What ``forgetting`` found, as means over all predicted tokens.

    Attributes:
        kl: KL(base || adapted) in nats per token. base_loss, adapted_loss: cross-entropy in nats per token. tokens: how many.
    """

    kl: float
    base_loss: float
    adapted_loss: float
    tokens: int

    @property
    def loss_difference(self) -> float:
        """Adapted minus base, in nats per token: above 0 the text is predicted worse than before."""
        return self.adapted_loss - self.base_loss


@torch.no_grad()
def forgetting(
    model: nn.Module,
    examples: Sequence[Encoded],
    adapter_name: str = "default",
    *,
    batch_size: int = 8,
    tokens_at_a_time: int = 256,
) -> Forgetting:
    """KL(base || adapted) and the two losses on a text that the adapter was not trained for.

    The base is the same model without its adapters. Every token but the first of an example counts, whatever its label. Logits are fp32
    at least; the sums over tokens are fp64. Rounding is about 1e-7 nats per token.

    Args:
        examples: the text, encoded. batch_size: examples that go through the model at once, once with the adapter and once without.
        tokens_at_a_time: for how many tokens the logits of both are there at once; they take ``8 * vocabulary`` bytes a token, and the
            softmax twice as much again. Where the head is adapted or its output changed (``head.why_all_logits``) the model is called
            once more for each further so many tokens.

    Raises:
        DataError: no example, one of fewer than two tokens, or one that the model cannot read. StateError: as ``subject.measured``.
    """
    validate.whole("batch_size", batch_size, 1)
    validate.whole("tokens_at_a_time", tokens_at_a_time, 1)
    for number, example in enumerate(examples, 1):
        if len(example.input_ids) < 2:
            raise DataError(
                f"{example.where or f'example {number}'}: {len(example.input_ids)} tokens, so none is predicted; leave it out"
            )
    texts = [learnt(example.input_ids) for example in examples]
    check_examples(model, texts, 0, "forgetting")
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    with measured(model, adapter_name) as record:
        for batch in batched(texts, batch_size):
            for base, adapted, targets in _both_logits(model, record, collate(batch, 0), tokens_at_a_time):
                parts = divergence(base, adapted), cross_entropy(base, targets), cross_entropy(adapted, targets)
                sums += torch.stack([part.cpu().double().sum() for part in parts])
                tokens += len(targets)
    kl, base_loss, adapted_loss = (sums / tokens).tolist()
    return Forgetting(kl, base_loss, adapted_loss, tokens)


def divergence(base: Tensor, adapted: Tensor) -> Tensor:
    """KL(base || adapted) in nats of each token, ``[tokens]``, of logits ``[tokens, vocabulary]`` in any floating dtype."""
    kind = torch.promote_types(base.dtype, torch.float32)
    p, q = base.to(kind).log_softmax(-1), adapted.to(kind).log_softmax(-1)
    return torch.where(p == -torch.inf, 0, p.exp() * (p - q)).sum(-1)  # what the base rules out adds nothing


def _both_logits(
    model: nn.Module, record: Adapters, batch: dict[str, Tensor], most: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``(base logits, adapted logits, targets)`` of all tokens to predict, at most so many at a time."""
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    targets = batch["labels"][:, 1:]
    counts, places = targets != IGNORED, torch.arange(targets.shape[1], device=device)
    if why_all_logits(model) is None:  # what goes into the head is small, and one head makes logits of both
        adapted, head = ask_for_hidden(model, batch, places)
        with record.bare():
            base, _ = ask_for_hidden(model, batch, places)
        for old, new, some in zip(*(each[counts].split(most) for each in (base, adapted, targets)), strict=True):
            yield head(old), head(new), some
        return
    for some in places.split(max(1, most // len(targets))):
        adapted = ask(model, batch, some)[counts[:, some]]
        with record.bare():
            base = ask(model, batch, some)[counts[:, some]]
        yield base, adapted, targets[:, some][counts[:, some]]

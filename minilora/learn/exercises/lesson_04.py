"""Lesson 4. What is learnt from.

A model reads the whole conversation and is scored on the answer alone. The label of a token is its own id where it counts, and -100 where
it does not; the logits at a position predict the token after it. Fill in the functions; ``minilora learn check 4`` looks at them.
"""

import torch

IGNORED = -100


def labels(ids: list[int], places: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """A label for each token: its id if it has a letter that is to be learnt, else IGNORED.

    Token i stands for the letters places[i][0] up to, not with, places[i][1] of the text. ``spans`` are the letters that are to be
    learnt, given likewise; both are in the order of the text. A token of which only a part lies in a span counts.
    """
    raise NotImplementedError


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy in nats over the tokens that count, a tensor without dimensions.

    logits is [batch, length, vocabulary] fp32, labels [batch, length] int64 with IGNORED where nothing counts. Nothing before it predicts
    the first token of a row. At least one token counts.
    """
    raise NotImplementedError


def padded(ids: list[list[int]], labels: list[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """The tensors of a batch, int64 [batch, longest], filled up on the right.

    Keys: "input_ids", "labels", and "attention_mask" with 1 for a token and 0 for what was filled up. What is filled up never counts.
    """
    raise NotImplementedError

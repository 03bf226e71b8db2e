"""Train single rows of an embedding (``trainable_token_indices``): for new special tokens, without the whole table.

The rows are kept as their new values, as PEFT keeps them, so that a table that was resized and drawn again loads right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from minilora.errors import TargetError
from minilora.linear.layers import dense_weight, embed_scale
from minilora.lora.adapter import Adapter
from minilora.lora.variants.embedding import Tied


class TokenRows(Adapter):
    """An embedding of which some rows are replaced by trained ones.

    Attributes:
        trainable_tokens_delta: ``[rows, dimension]`` fp32, trained: the rows' values.
        token_indices: int64 ``[rows]``, which rows.
    """

    file_names: ClassVar[dict[str, str]] = {"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"}
    reads_base: ClassVar[bool] = True
    targeted: ClassVar[bool] = False
    token_indices: Tensor

    def __init__(self, base_layer: nn.Module, indices: Sequence[int], path: str) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        table = dense_weight(base_layer)
        self.out_features, self.in_features = table.shape
        if max(indices) >= len(table):
            raise TargetError(
                f"trainable_token_indices: token {max(indices)} is not in {path}, which has {len(table)} rows; wanted less"
            )
        self.register_buffer("token_indices", torch.tensor(list(indices), device=table.device), persistent=False)
        self.trainable_tokens_delta = nn.Parameter(table[self.token_indices].to(torch.float32, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        return _with_rows(self, self, x)

    def refuses(self, other: Adapter) -> str:
        return _overlap(self, other)

    def delta_weight(self) -> Tensor:
        table = dense_weight(self.innermost).float()
        return torch.zeros_like(table).index_copy_(
            0, self.token_indices, self.trainable_tokens_delta.float() - table[self.token_indices]
        )


class HeadRows(TokenRows):
    """An output head of its own (not tied to the embedding) of which some rows are replaced by trained ones."""

    def forward(self, x: Tensor) -> Tensor:
        return _with_logits(self, self, x)


class TiedToRows(Tied):
    """Base of what shares its weight with an embedding of which rows train."""

    reads_base: ClassVar[bool] = True

    @property
    def trainable_tokens_delta(self) -> Tensor:
        """The other's rows."""
        return self.source.trainable_tokens_delta

    def refuses(self, other: Adapter) -> str:
        return _overlap(self.source, other)


class TiedTable(TiedToRows):
    """Another embedding over the same table (an encoder's and a decoder's): the same rows are replaced in it."""

    def forward(self, x: Tensor) -> Tensor:
        return _with_rows(self, self.source, x)


class TiedRows(TiedToRows):
    """The output head that shares its weight with an embedding of which rows train: the same rows give its logits."""

    def forward(self, x: Tensor) -> Tensor:
        return _with_logits(self, self.source, x)


def _overlap(rows: TokenRows, other: Adapter) -> str:
    """Why these rows and another adapter's cannot be added: a row that both train has two values."""
    source = other.source if isinstance(other, Tied) else other
    both = set(rows.token_indices.tolist()) & set(
        source.token_indices.tolist() if isinstance(source, TokenRows) else ()
    )
    if not both:
        return ""
    return (
        f"both train token {min(both)}; token indices that are already defined and would result in undefined merging behavior are "
        "refused, activate or merge one of them"
    )


def _with_rows(layer: Adapter, source: TokenRows, x: Tensor) -> Tensor:
    """Token ids to their rows, those that ``source`` trains from there; what other adapters add to a row stays added."""
    rows = layer.base_layer(x)
    found = x.unsqueeze(-1) == source.token_indices
    new = source.trainable_tokens_delta.to(rows.dtype)[found.int().argmax(-1)] * embed_scale(layer.innermost)
    if isinstance(layer.base_layer, Adapter):
        new = rows + (new - layer.innermost(x))
    return torch.where(found.any(-1, keepdim=True), new, rows)


def _with_logits(layer: Adapter, source: TokenRows, x: Tensor) -> Tensor:
    """Hidden states to logits, those of the rows that ``source`` trains from there; what other adapters add to them stays added."""
    logits, rows = layer.base_layer(x), source.trainable_tokens_delta.to(x.dtype)
    if isinstance(layer.base_layer, Adapter):
        was = dense_weight(layer.innermost)[source.token_indices].to(x.dtype)
        return logits.index_add(-1, source.token_indices, x @ (rows - was).T)
    new = x @ rows.T
    if (bias := getattr(layer.innermost, "bias", None)) is not None:
        new = new + bias[source.token_indices].to(new.dtype)
    return logits.index_copy(-1, source.token_indices, new)

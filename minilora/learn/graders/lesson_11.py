"""Cases of lesson 11. A gate on the outputs is one on the rows of B: ``LoRALinear`` with such rows is the twin. And the law itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from minilora.learn.case import Case, Exercise, drawn
from minilora.learn.graders.twin import twin
from minilora.learn.shown import difference
from minilora.lora.layer import LoRALinear

__all__ = ["EXERCISES"]


def _inputs() -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """``(A, B, d, scaling)``, small ones first."""
    yield torch.tensor([[1.0, 0.0]]), torch.ones(3, 1), torch.tensor([1.0, 2.0, 0.0]), 1.0
    yield torch.tensor([[1.0, 0.0]]), torch.ones(3, 1), torch.tensor([1.0, 1.0, 1.0]), 4.0
    for seed, (in_features, out_features, r) in enumerate([(4, 4, 2), (5, 7, 3), (9, 6, 4)]):
        A, B, d = drawn(seed, (r, in_features), (out_features, r), (out_features,))
        yield A, B, d, 1.5


def _gated(A: Tensor, B: Tensor, d: Tensor, scaling: float) -> LoRALinear:
    return twin(torch.zeros(len(B), A.shape[1]), A, torch.diag(d) @ B, scaling * len(A))


def _update() -> Iterator[Case]:
    for seed, (A, B, d, scaling) in enumerate(_inputs()):
        for shape in ((1, A.shape[1]), (2, 3, A.shape[1])):
            (x,) = (torch.ones(shape),) if seed < 2 else drawn(seed, shape)
            yield Case((x, A, B, d, scaling), _gated(A, B, d, scaling).update(x))


def _delta_weight() -> Iterator[Case]:
    for A, B, d, scaling in _inputs():
        yield Case((A, B, d, scaling), _gated(A, B, d, scaling).delta_weight())


def _as_lora() -> Iterator[Case]:
    for A, B, d, scaling in _inputs():
        yield Case((A, B, d, scaling), law=_same_update)


def _same_update(got: Any, A: Tensor, B: Tensor, d: Tensor, scaling: float) -> str | None:
    if not isinstance(got, tuple) or len(got) != 2:
        return f"got a {type(got).__name__}; wanted a tuple (A, B)"
    for name, factor, like in (("A", got[0], A), ("B", got[1], B)):
        if found := difference(torch.zeros_like(factor), torch.zeros_like(like)):
            return f"{name}: {found}"
    found = difference(got[1] @ got[0], _gated(A, B, d, scaling).delta_weight(), 1e-5)
    return f"B A: {found}" if found else None


def _keeps_the_law() -> Iterator[Case]:
    A, B, _ = drawn(7, (3, 6), (5, 3), (1,))
    layer, none = twin(torch.zeros(5, 6), A, B, 6.0), twin(torch.zeros(5, 6), A, 0 * B, 6.0)
    right, delta = layer.update, layer.delta_weight
    yield _judges("minilora's LoRALinear", right, delta, True)
    yield _judges("a delta_weight without the scaling", right, lambda: delta() / layer.scaling, False)
    yield _judges("an update without a low-rank part, and a delta_weight with one", none.update, delta, False)
    yield _judges("an adapter with B = 0", none.update, none.delta_weight, True)
    yield _judges("a delta_weight that is off by one percent", right, lambda: 1.01 * delta(), False)
    yield _judges("an update that adds a bias of 0.5", lambda x: right(x) + 0.5, delta, False)
    yield _judges("an update that is the magnitude of the right one", lambda x: right(x).abs(), delta, False)
    yield _judges("an update whose inputs are cut off at 20", lambda x: right(x.clamp(-20, 20)), delta, False)
    yield _judges("an update that does not see input 4", lambda x: right(x * _BUT_4), delta, False)
    yield _judges("an update with a batch's mean taken off", lambda x: right(x - x.mean(0)), delta, False)
    yield _judges("LoRALinear with B a million times as large", *_large(A, B), True)


_BUT_4 = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])


def _large(A: Tensor, B: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[], Tensor]]:
    layer = twin(torch.zeros(5, 6), A, 1e6 * B, 6.0)
    return layer.update, layer.delta_weight


def _judges(said: str, update: Callable[[Tensor], Tensor], delta: Callable[[], Tensor], holds: bool) -> Case:
    return Case((update, delta, 6), holds, said=said)


EXERCISES = (
    Exercise("update", _update),
    Exercise("delta_weight", _delta_weight),
    Exercise("as_lora", _as_lora),
    Exercise("keeps_the_law", _keeps_the_law),
)

"""Cases of lesson 11. A volume of the outputs is one of the rows of B: ``LoRALinear`` with such rows is the twin. And the law itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from minilora.learn.case import Case, Exercise, drawn
from minilora.learn.graders.twin import twin
from minilora.learn.shown import difference, kind_of
from minilora.lora.layer import LoRALinear

__all__ = ["EXERCISES"]


def _inputs() -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """``(A, B, v, scaling)``, small ones first."""
    yield torch.tensor([[1.0, 0.0]]), torch.ones(3, 1), torch.tensor([1.0, 2.0, 0.0]), 1.0
    yield torch.tensor([[1.0, 0.0]]), torch.ones(3, 1), torch.tensor([1.0, 1.0, 1.0]), 4.0
    for seed, (in_features, out_features, r) in enumerate([(4, 4, 2), (5, 7, 3), (9, 6, 4)]):
        A, B, v = drawn(seed, (r, in_features), (out_features, r), (out_features,))
        yield A, B, v, 1.5


def _louder(A: Tensor, B: Tensor, v: Tensor, scaling: float) -> LoRALinear:
    return twin(torch.zeros(len(B), A.shape[1]), A, torch.diag(v) @ B, scaling * len(A))


def _update() -> Iterator[Case]:
    for seed, (A, B, v, scaling) in enumerate(_inputs()):
        for shape in ((1, A.shape[1]), (2, 3, A.shape[1])):
            (x,) = (torch.ones(shape),) if seed < 2 else drawn(seed, shape)
            yield Case((x, A, B, v, scaling), _louder(A, B, v, scaling).update(x))


def _delta_weight() -> Iterator[Case]:
    for A, B, v, scaling in _inputs():
        yield Case((A, B, v, scaling), _louder(A, B, v, scaling).delta_weight())


def _as_lora() -> Iterator[Case]:
    for A, B, v, scaling in _inputs():
        yield Case((A, B, v, scaling), law=_same_update)


def _same_update(got: Any, A: Tensor, B: Tensor, v: Tensor, scaling: float) -> str | None:
    if not isinstance(got, tuple) or len(got) != 2:
        return f"got {kind_of(got)}; wanted a tuple (A, B)"
    for name, factor, like in (("A", got[0], A), ("B", got[1], B)):
        if found := difference(torch.zeros_like(factor), torch.zeros_like(like)):
            return f"{name}: {found}"
    found = difference(got[1] @ got[0], _louder(A, B, v, scaling).delta_weight(), 1e-5)
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
    yield _judges(
        "a delta_weight of which two columns are swapped", right, lambda: delta()[:, [1, 0, 2, 3, 4, 5]], False
    )
    for said, update in _variants(right):
        yield _judges(f"an update {said}", update, delta, False)
    large = twin(torch.zeros(5, 6), A, 1e6 * B, 6.0)
    yield _judges("LoRALinear with B a million times as large", large.update, large.delta_weight, True)


_Update = Callable[[Tensor], Tensor]
_BUT_4 = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])


def _variants(right: _Update) -> Iterator[tuple[str, _Update]]:
    """Updates that no delta_weight does; each is right for inputs of some kind."""
    yield "that adds a bias of 0.5", lambda x: right(x) + 0.5
    yield "that is the magnitude of the right one", lambda x: right(x).abs()
    yield "that takes the magnitude of its inputs", lambda x: right(x.abs())
    yield "that takes inputs below 0 for 0", lambda x: right(x.clamp(min=0))
    yield "that takes inputs above 0 for 0", lambda x: right(x.clamp(max=0))
    yield "whose inputs are cut off at 20", lambda x: right(x.clamp(-20, 20))
    yield "that takes inputs from -0.1 to 0.1 for 0", lambda x: right(x * (x.abs() > 0.1))
    yield "that does not see input 4", lambda x: right(x * _BUT_4)
    yield "with the mean of the rows taken off", lambda x: right(x - x.mean(0))
    yield "that answers each row with the mean of the rows", lambda x: right(x).mean(0).expand(len(x), -1)


def _judges(said: str, update: _Update, delta: Callable[[], Tensor], holds: bool) -> Case:
    def verdict(got: Any, *_: Any) -> str | None:
        found = difference(got, holds)
        return f"{found}; {_apart(update, delta)}" if found and got is False else found

    return Case((update, delta, 6), law=verdict, said=said)


def _apart(update: _Update, delta: Callable[[], Tensor]) -> str:
    """How far the two are apart where the law holds."""
    (x,) = drawn(0, (64, 6))
    wanted = x @ delta().T
    most, largest = float((update(x) - wanted).abs().max()), float(wanted.abs().max())
    if not most:
        return "the two are equal for every x"
    return f"the two differ by rounding alone, {most / largest:.1e} of the largest output"


EXERCISES = (
    Exercise("update", _update),
    Exercise("delta_weight", _delta_weight),
    Exercise("as_lora", _as_lora),
    Exercise("keeps_the_law", _keeps_the_law),
)

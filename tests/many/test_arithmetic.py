"""Sums of updates against PEFT's functions of the same names."""

import pytest
import torch

from minilora.errors import ConfigError
from minilora.many import arithmetic
from minilora.many.combine import quantile

merge_utils = pytest.importorskip("peft.utils.merge_utils")


def tensors(shape=(4, 7)):
    torch.manual_seed(0)
    return [torch.randn(shape) for _ in range(3)], torch.tensor([0.5, -1.25, 2.0])


@pytest.mark.parametrize("shape", [(4, 7), (9,), (2, 3, 5)])
@pytest.mark.parametrize("density", [0.01, 0.3, 0.77])
@pytest.mark.parametrize("name", ["magnitude_prune", "dare_linear", "ties", "dare_ties", "task_arithmetic"])
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_sums_are_those_of_peft(name, density, majority, shape):
    parts, weights = tensors(shape)
    more = () if name == "task_arithmetic" else (density,)
    more = (*more, majority) if name in ("ties", "dare_ties") else more
    torch.manual_seed(5)
    got = getattr(arithmetic, name)(parts, weights, *more)
    torch.manual_seed(5)
    want = getattr(merge_utils, name)(parts, weights, *more)
    assert torch.equal(got, want) and got.shape == torch.Size(shape)


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("rescale", [False, True])
def test_pruning_is_that_of_peft(method, rescale):
    (tensor, *_), _ = tensors()
    torch.manual_seed(5)
    got = arithmetic.prune(tensor, 0.4, method, rescale)
    torch.manual_seed(5)
    assert (
        torch.equal(got, merge_utils.prune(tensor, 0.4, method, rescale)) and 0 < got.count_nonzero() < tensor.numel()
    )
    assert arithmetic.prune(tensor, 1, method) is tensor
    assert not arithmetic.prune(tensor, 0, method).any()


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_signs_are_elected_as_in_peft(method):
    parts, weights = tensors()
    stack = torch.stack(parts)
    mask = arithmetic.calculate_majority_sign_mask(stack, method)
    assert torch.equal(mask, merge_utils.calculate_majority_sign_mask(stack, method)) and 0 < mask.sum() < mask.numel()
    assert torch.equal(arithmetic.disjoint_merge(stack, mask), merge_utils.disjoint_merge(stack, mask))
    assert arithmetic.reshape_weight_task_tensors(stack, weights).shape == (3, 1, 1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: arithmetic.prune(t, -0.1, "magnitude"), "density=-0.1"),
        (lambda t: arithmetic.prune(t, 1.5, "magnitude"), "density=1.5"),
        (lambda t: arithmetic.prune(t, float("nan"), "random"), "density=nan"),
        (lambda t: arithmetic.prune(t, 0.5, "small"), "method='small'"),
        (lambda t: arithmetic.random_pruning(t, 0, True), "density=0"),
        (lambda t: arithmetic.calculate_majority_sign_mask(t, "most"), "majority_sign_method='most'"),
    ],
)
def test_what_cannot_be_meant(call, says):
    with pytest.raises(ConfigError, match=says):
        call(torch.ones(2, 3))


@pytest.mark.parametrize("share", [0.0, 0.13, 0.5, 0.999, 1.0])
def test_a_quantile_is_that_of_torch(share):
    values = torch.randn(101, generator=torch.Generator().manual_seed(0))
    assert quantile(values, share) == pytest.approx(float(torch.quantile(values, share)), rel=1e-6)

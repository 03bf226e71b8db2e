"""The ledger: what it counts is what is held, on paper and in memory."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from minilora.measure.ledger import Ledger, on_paper

KB = 4 * 1000  # bytes of a tensor of 1000 fp32 numbers


def test_the_peak_is_the_most_that_was_alive_at_once():
    with Ledger() as ledger:
        ledger.phase = "first"
        a = torch.ones(1000)
        b = a * 2
        del a
        ledger.phase = "second"
        c = b + b.view(10, 100).reshape(1000)  # views hold nothing of their own
        d = torch.cat([b, c])
        del b, c
        ledger.phase = "third"
        d.add_(1)
    assert ledger.peak() == ("second", {"": 4 * KB})
    assert [held.nbytes for held in ledger.alive()] == [2 * KB]


def test_kinds_are_kept_apart_and_decided_late():
    with Ledger() as ledger:
        a = torch.ones(1000)
        b = torch.ones(500)
        ledger.hold([a], "weights")
        c = a[:500] + b
        ledger.hold([c], "sum")
    assert ledger.peak()[1] == {"weights": KB, "": KB // 2, "sum": KB // 2}


def test_nothing_seen_is_no_peak():
    assert Ledger().peak() == ("", {})


def test_what_an_operator_takes_inside_counts_while_it_runs():
    with Ledger({torch.ops.aten.mul.Tensor: lambda args, out: 8 * out.numel()}) as ledger:
        a = torch.ones(1000)
        b = a * a
    assert ledger.peak()[1] == {"": 4 * KB} and sum(held.nbytes for held in ledger.alive()) == 2 * KB
    assert b.shape == a.shape


def test_a_model_on_paper_has_shapes_and_no_memory(make_mlp, snapshot):
    model = make_mlp()
    model.first.weight.requires_grad_(False)
    model.tied = model.first.weight
    model.constant = torch.ones(3)
    before = snapshot(model)
    paper = on_paper(model)
    assert snapshot(model) == before
    for (name, real), (same, fake) in zip(model.named_parameters(), paper.named_parameters(), strict=True):
        assert name == same and isinstance(fake, FakeTensor) and isinstance(fake, nn.Parameter)
        assert (fake.shape, fake.dtype, fake.requires_grad) == (real.shape, real.dtype, real.requires_grad)
    assert paper.tied is paper.first.weight and isinstance(paper.constant, FakeTensor)
    assert paper(torch.randn(3, 12)).shape == (3, 5)


def test_a_model_of_a_terabyte_runs_on_paper():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(500_000, 300_000), nn.ReLU(), nn.Linear(300_000, 7))
    paper = on_paper(model)
    with Ledger() as ledger:
        paper(torch.randn(2, 500_000)).sum().backward()
    assert 600e9 < ledger.peak()[1][""] < 1300e9


@pytest.mark.parametrize("write", [False, True])
def test_masks_may_select_on_paper(write):
    paper = on_paper(nn.Linear(6, 4))
    x, mask = torch.randn(5, 6), torch.tensor([True, False, True, True, False])
    with Ledger():
        y = paper(x)
        if write:
            y = y.clone()
            y[mask] = 0.0
        else:
            y = y[mask]
        y.sum().backward()
    assert y.shape == ((5, 4) if write else (3, 4)) and paper.weight.grad.shape == (4, 6)


def test_what_forward_leaves_is_what_autograd_saved(make_llama, ids):
    """An independent count: the storages that autograd packs away, each once, less weights and inputs."""
    paper = on_paper(make_llama())
    for parameter in paper.parameters():
        parameter.requires_grad_(parameter.dim() == 1)  # the norms train: activations everywhere
    own = {tensor.untyped_storage()._cdata for tensor in (*paper.parameters(), *paper.buffers(), ids)}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with Ledger() as ledger, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ledger.hold([*paper.parameters(), *paper.buffers(), ids], "own")
        loss = paper(input_ids=ids, labels=ids, use_cache=False).loss
        alive = sum(held.nbytes for held in ledger.alive() if held.kind != "own")
    assert loss.requires_grad and sum(saved.values()) > 20_000
    assert alive == pytest.approx(sum(saved.values()), rel=0.02)

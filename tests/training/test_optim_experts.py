"""Optimizers that look at pairs of factors see each expert's pair as the one of a layer of its own."""

import pytest
import torch
from torch import nn

import minilora
from minilora.lora.slots import adapters_in
from minilora.training.optim_lora_fa import create_lorafa_optimizer
from minilora.training.optim_riemannian import factor_pairs, precondition
from tests.models import moe

pytest.importorskip("transformers")
CONFIG = minilora.LoraConfig(r=3, lora_alpha=5, target_modules=None, target_parameters=["experts.down_proj"])


def trained():
    """A model after a backward pass, with something in B."""
    model = minilora.inject(moe(), CONFIG).train()
    for adapter in adapters_in(model):
        nn.init.normal_(adapter.lora_B, generator=torch.Generator().manual_seed(1))
    model(torch.arange(14).view(2, 7)).logits.square().mean().backward()
    return model


def test_each_expert_is_preconditioned_as_a_layer_of_its_own():
    model = trained()
    pairs = factor_pairs(model)
    assert [tuple(A.shape) for A, _ in pairs] == [(5, 3, 20)] * 2
    alone = []
    for A, B in pairs:
        for at in range(5):
            one = tuple(nn.Parameter(each[at].detach().clone()) for each in (A, B))
            one[0].grad, one[1].grad = A.grad[at].clone(), B.grad[at].clone()
            alone.append(one)
    precondition(pairs, 0.01)
    precondition(alone, 0.01)
    for at, (A, B) in enumerate(pairs):
        for expert in range(5):
            own = alone[5 * at + expert]
            torch.testing.assert_close(A.grad[expert], own[0].grad)
            torch.testing.assert_close(B.grad[expert], own[1].grad)


def test_lora_fa_projects_each_expert_s_gradient():
    model = trained()
    B = adapters_in(model)[0].lora_B
    A, grad, before = adapters_in(model)[0].lora_A, B.grad.clone(), B.detach().clone()
    optimizer = create_lorafa_optimizer(model, 3, 5, lr=0.1)
    optimizer.step()
    for expert in range(5):
        wanted = grad[expert] @ torch.linalg.pinv(A[expert] @ A[expert].T + 1e-8 * torch.eye(3)) / (5 / 3) ** 2
        step = 0.1 * wanted / (wanted.abs() + 1e-6 / (1 - 0.999) ** 0.5)  # the first step of Adam, its bias corrected
        torch.testing.assert_close(before[expert] - B[expert], step, rtol=1e-3, atol=1e-5)
    assert not A.requires_grad

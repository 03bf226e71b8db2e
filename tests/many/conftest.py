"""What the tests of several adapters share: rows for the MLP, and adapters that are not at their start."""

import pytest
import torch

from minilora import inject
from tests.models import LAYERS, lora


@pytest.fixture
def x():
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def add(randomize):
    """``add(model, name, targets, **fields)``: an adapter with random values, active."""

    def put(model, name, targets=LAYERS, variant=None, **fields):
        inject(model, lora(targets, **fields), name, variant)
        return randomize(model, sum(map(ord, name)))

    return put

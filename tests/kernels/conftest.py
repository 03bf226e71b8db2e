"""Memory in which what a kernel forgets to write, or writes too far, shows."""

import pytest
import torch

GUARD = 64  # elements on both sides


@pytest.fixture
def poisoned(monkeypatch):
    """``torch.empty`` gives NaN (255 in bytes) between guards of the same, and the guards are looked at in the end."""
    real, taken = torch.empty, []

    def empty(*shape, dtype=None, device=None):
        shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if device is not None and torch.device(device).type == "meta":
            return real(shape, dtype=dtype, device=device)
        memory = real(shape.numel() + 2 * GUARD, dtype=dtype, device=device)
        memory.fill_(float("nan") if memory.is_floating_point() else 255)
        taken.append((memory, shape.numel()))
        return memory[GUARD : GUARD + shape.numel()].view(shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    for memory, count in taken:
        for guard in (memory[:GUARD], memory[GUARD + count :]):
            byte = 1 if guard.dtype == torch.bool else 255
            assert bool((guard.isnan() if guard.is_floating_point() else guard == byte).all()), (
                "written beyond the result"
            )

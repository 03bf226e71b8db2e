"""Cases of lesson 3. What is wanted is what ``lora/targets.py`` and ``lora/match.py`` select, and what ``inject`` trains."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from minilora.learn.case import Case, Exercise, Raises
from minilora.lora.config import LoraConfig
from minilora.lora.inject import inject
from minilora.lora.match import linear_paths
from minilora.lora.targets import select

__all__ = ["EXERCISES"]

_PATHS = [f"model.layers.{n}.{name}" for n in range(2) for name in ("q_proj", "up_proj", "mlp.proj")] + ["proj"]


class _Model(nn.Module):
    """Linear layers inside others, a layer that is none, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def _targets() -> Iterator[Case]:
    yield Case((["a.q_proj", "a.k_proj"], ["q_proj"]), ["a.q_proj"])
    for wanted in (["proj"], ["up_proj", "q_proj"], ["mlp.proj"], ["layers.1.q_proj", "q_proj"], ["proj", "mlp.proj"]):
        yield Case((_PATHS, wanted), select(_PATHS, wanted, "target_modules"))
    yield Case((_PATHS, ["model.layers.0.q_proj"]), ["model.layers.0.q_proj"])
    yield Case((_PATHS, ["q_proj", "qproj"]), Raises(ValueError))
    yield Case((_PATHS, ["roj"]), Raises(ValueError))


def _linear_paths() -> Iterator[Case]:
    flat = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    for model in (flat, _Model(), nn.Sequential(nn.Conv1d(2, 3, 1), nn.Sequential(nn.Linear(3, 3)))):
        yield Case((model,), linear_paths(model))


def _trained_numbers() -> Iterator[Case]:
    for layers, wanted, r in [
        ({"q": (3, 5)}, ["q"], 2),
        ({"q": (3, 5), "k": (2, 5), "bq": (7, 7)}, ["q"], 3),
        ({"q": (3, 5), "k": (2, 5), "v": (2, 5)}, ["q", "v"], 4),
    ]:
        with torch.random.fork_rng(devices=[]):
            model = nn.ModuleDict({name: nn.Linear(size[1], size[0]) for name, size in layers.items()})
            inject(model, LoraConfig(r=r, lora_alpha=1, target_modules=wanted))
        yield Case((layers, wanted, r), sum(p.numel() for p in model.parameters() if p.requires_grad))
    shapes = {f"layers.{n}.{name}": (64 - n, 48) for n in range(3) for name in ("q_proj", "v_proj")}
    chosen = select(shapes, ["q_proj", "1.v_proj"], "target_modules")
    yield Case((shapes, ["q_proj", "1.v_proj"], 8), sum(8 * shapes[path][0] + 8 * shapes[path][1] for path in chosen))


EXERCISES = (
    Exercise("targets", _targets),
    Exercise("linear_paths", _linear_paths),
    Exercise("trained_numbers", _trained_numbers),
)

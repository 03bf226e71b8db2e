"""How far the first step goes does not depend on the rank, if scaling and optimizer fit each other.

B starts at zero, so ``dW = s B A`` after a step of B alone. SGD steps B by ``-rate s G A^T``, and ``dW`` grows as ``s^2 r``; Adam steps
every number of B by ``rate``, whatever the gradient, and what of ``dW`` lies along ``-G`` grows as ``s r``.
"""

import math
from typing import Any

import torch
from torch import Tensor

from minilora.lab.ground.by_hand import adapted, batches, mean_loss, weight_gradients
from minilora.lab.ground.claim import Claim, Curve, Finding, Picture, all_of, within
from minilora.lab.ground.ground import Ground
from minilora.lab.measures.subject import fixed_updates
from minilora.lab.verdicts.interval import interval, slope

CLAIM = Claim(
    name="first-step",
    sentence="The first step along -G goes as r^0 (Adam, alpha/r; SGD, alpha/sqrt(r)), r^0.5 (Adam, alpha/sqrt(r)), r^-1 (SGD, alpha/r).",
    source="of minilora's own; about Kalajdzievski 2023, rsLoRA, arXiv 2312.03732, theorem 3.2",
    number="exponents 0, 1/2, 0 and -1 from r = 1 to 256",
)
RANKS = (1, 4, 16, 64, 256)
SEEDS = range(10)  # a first step is cheap, and at rank 1 much depends on the one row of A that is drawn
EXPONENTS = {
    ("Adam", "alpha/r"): 0, ("Adam", "alpha/sqrt(r)"): 0.5, ("SGD", "alpha/sqrt(r)"): 0, ("SGD", "alpha/r"): -1,
}  # fmt: skip
RATE = 1e-3  # any; the step is measured in it
OFF = 0.05  # of an exponent: over the 8 doublings from 1 to 256 a factor of 1.3
OPTIMIZERS: dict[str, Any] = {"Adam": torch.optim.Adam, "SGD": torch.optim.SGD}


def run(ground: Ground) -> Finding:
    found = {seed: _progress(ground, seed) for seed in SEEDS}
    rows: list[dict[str, Any]] = []
    verdicts, curves = [], []
    for case, wanted in EXPONENTS.items():
        off = interval([_exponent(by_case[case]) - wanted for by_case in found.values()])
        verdicts.append(within(off, OFF))
        rows.append({"case": ", ".join(case), "exponent said": wanted, "off by": off, "verdict": verdicts[-1]})
        values = zip(*(by_case[case] for by_case in found.values()), strict=True)
        points = [(float(r), math.fsum(v) / len(v), min(v), max(v)) for r, v in zip(RANKS, values, strict=True)]
        curves.append(Curve(", ".join(case), points))
    exponents = "; ".join(f"{row['case']}: {row['exponent said'] + row['off by'].mean:.3f}" for row in rows)
    picture = Picture("r", "first step along -G, per rate", curves, log_x=True, log_y=True)
    return Finding(all_of(verdicts), f"Fitted exponents: {exponents}.", rows, picture)


def _progress(ground: Ground, seed: int) -> dict[tuple[str, str], list[float]]:
    """``<dW, -G> / (rate ||G||)`` of one step by case, a number a rank; G is the gradient of all adapted weights together."""
    batch = batches(ground, seed, 1)[0]
    gradients = weight_gradients(ground, batch)
    found: dict[tuple[str, str], list[float]] = {case: [] for case in EXPONENTS}
    for r in RANKS:
        for scaling in ("alpha/r", "alpha/sqrt(r)"):
            model = adapted(ground, seed, r=r, use_rslora=scaling == "alpha/sqrt(r)")
            mean_loss(model, batch).backward()
            for name in OPTIMIZERS:
                found[name, scaling].append(_step(model, name, gradients))
    return found


@torch.no_grad()
def _step(model: Any, name: str, gradients: dict[str, Tensor]) -> float:
    """Take the step, see how far it goes along ``-G``, and take it back; the gradients stay."""
    OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad], lr=RATE).step()
    along = square = 0.0
    for path, adapter in fixed_updates(model, "default").items():
        along -= float((adapter.delta_weight() * gradients[path]).sum(dtype=torch.float64))
        square += float(gradients[path].square().sum(dtype=torch.float64))
        adapter.reset()
    return along / (RATE * math.sqrt(square))


def _exponent(values: list[float]) -> float:
    """In ``value ~ r^exponent``."""
    return slope((math.log(r), math.log(value)) for r, value in zip(RANKS, values, strict=True))

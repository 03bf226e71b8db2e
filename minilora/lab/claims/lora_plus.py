"""LoRA+ is plain LoRA in other units: with A drawn larger and one rate for both factors, the same losses come out.

Adam's step of a factor does not depend on the size of its gradient. With ``A' = sqrt(lambda) A``, ``B' = B / sqrt(lambda)`` the product is
the same, and rates ``rate`` of A and ``lambda rate`` of B are ``sqrt(lambda) rate`` of both.
"""

import math
from dataclasses import replace

from minilora.lab.ground.by_hand import Recipe, largest_gap, train_by_hand
from minilora.lab.ground.claim import FAILS, HOLDS, Claim, Finding, all_of
from minilora.lab.ground.ground import Ground

CLAIM = Claim(
    name="lora-plus",
    sentence="LoRA+ with ratio lambda is plain LoRA with A drawn sqrt(lambda) times as large and the rate times sqrt(lambda).",
    source="of minilora's own; about Hayou et al. 2024, LoRA+, arXiv 2402.12354, section 4",
    number="to the bit for powers of 4 where eps does not count (1e-30), 3e-5 nats a byte at eps 1e-8",
    exact=True,
)
RATE, STEPS = 1e-3, 20
CLOSE = 1e-3  # nats a byte: what may come of rounding and of eps, where the law is not to the bit
NO_EPS = {"eps_A": 1e-30, "eps_B": 1e-30}
LAW = {"lambda 4": (4, NO_EPS, 0.0), "lambda 16": (16, NO_EPS, 0.0)}
NEAR = {"lambda 8": (8, NO_EPS, CLOSE), "lambda 16, eps 1e-8": (16, {}, CLOSE)}
# Where the law's conditions are not met; how much they matter is said, and nothing is promised.
BROKEN = {"lambda 16, clip 1": (16, {"clip": 1.0}), "lambda 16, weight decay 0.1": (16, {"weight_decay": 0.1})}


def run(ground: Ground) -> Finding:
    rows, verdicts = [], []
    for name, (ratio, fields, bound) in (LAW | NEAR).items():
        gap = _gap(ground, ratio, **fields)
        verdicts.append(HOLDS if gap <= bound else FAILS)  # NaN fails
        rows.append({"of": name, "largest difference of a loss": gap, "allowed": bound})
    for name, (ratio, fields) in BROKEN.items():
        rows.append(
            {"of": name, "largest difference of a loss": _gap(ground, ratio, **fields), "allowed": "not covered"}
        )
    found = ", ".join(f"{row['of']}: {row['largest difference of a loss']:.1e}" for row in rows)
    return Finding(all_of(verdicts), f"Largest difference of a loss in {STEPS} steps, nats a byte: {found}.", rows)


def _gap(ground: Ground, ratio: float, **fields: float) -> float:
    """The largest difference of the losses of LoRA+ and of plain LoRA in its units."""
    root, steps = math.sqrt(ratio), min(STEPS, ground.steps)
    plus = Recipe(rate_A=RATE, rate_B=ratio * RATE, **fields)  # type: ignore[arg-type]
    plain = replace(plus, size_A=root, rate_A=root * RATE, rate_B=root * RATE)
    return largest_gap(train_by_hand(ground, plus, 8, steps), train_by_hand(ground, plain, 8, steps))

"""Under Adam the scaling, the size of A's start and the two rates are three numbers, not four: the fourth is a choice of units."""

from dataclasses import replace

from minilora.lab.ground.by_hand import Recipe, largest_gap, train_by_hand
from minilora.lab.ground.claim import FAILS, HOLDS, Claim, Finding, all_of
from minilora.lab.ground.ground import Ground

CLAIM = Claim(
    name="adam",
    sentence=(
        "Under Adam, lora_alpha / (p q) with A drawn p times as large, the rates of A and B times p and q and their eps divided by p and q "
        "trains the same model for every p and q."
    ),
    source="of minilora's own; the law behind LoRA+ (arXiv 2402.12354) and alpha's part in LoRA Without Regret (Schulman et al. 2025)",
    number="the same losses to the bit for powers of two",
    exact=True,
)
BASE = Recipe(rate_A=1e-3, rate_B=2e-3)
POWERS = ((2, 1), (1, 2), (4, 0.5), (0.25, 8), (16, 16))
OTHERS = ((3, 0.7),)  # whose products are rounded
STEPS, CLOSE = 20, 1e-3  # CLOSE, nats a byte: what rounding may grow to


def run(ground: Ground) -> Finding:
    steps = min(STEPS, ground.steps)
    rows, verdicts = [], []

    def compare(name: str, recipe: Recipe, other: Recipe, bound: float | None) -> None:
        gap = largest_gap(train_by_hand(ground, recipe, 8, steps), train_by_hand(ground, other, 8, steps))
        rows.append({"of": name, "largest difference of a loss": gap, "allowed": "any" if bound is None else bound})
        if bound is not None:
            verdicts.append(HOLDS if gap <= bound else FAILS)  # NaN fails

    for p, q in POWERS:
        compare(f"p={p:g} q={q:g}", BASE, _in_units(BASE, p, q), 0.0)
    for p, q in OTHERS:
        compare(f"p={p:g} q={q:g}", BASE, _in_units(BASE, p, q), CLOSE)
    # Not promised: what makes it a law of Adam's.
    compare("p=4 q=0.5, SGD", replace(BASE, sgd=True), replace(_in_units(BASE, 4, 0.5), sgd=True), None)
    found = ", ".join(f"{row['of']}: {row['largest difference of a loss']:.1e}" for row in rows)
    return Finding(all_of(verdicts), f"Largest difference of a loss in {steps} steps, nats a byte: {found}.", rows)


def _in_units(recipe: Recipe, p: float, q: float) -> Recipe:
    """The same training with A in units of 1 / p and B in units of 1 / q."""
    return replace(
        recipe, alpha=recipe.alpha / (p * q), size_A=recipe.size_A * p, rate_A=recipe.rate_A * p, rate_B=recipe.rate_B * q,
        eps_A=recipe.eps_A / p, eps_B=recipe.eps_B / q,
    )  # fmt: skip

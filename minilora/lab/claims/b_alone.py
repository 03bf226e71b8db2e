"""Training B alone, beside an A that stays as it was drawn, nearly suffices."""

from typing import Any

from minilora.lab.ground.claim import Claim, Finding, above, all_of
from minilora.lab.ground.ground import Ground, Tuned
from minilora.lab.variants import LORA
from minilora.lab.verdicts.interval import Interval, interval

CLAIM = Claim(
    name="b-alone",
    sentence="With A frozen, B learns at least 95 % of what A and B learn together, at the same rank and with as many parameters.",
    source="Zhu et al. 2024, arXiv 2402.16842, abstract",
    number="equal or better with as many parameters (twice the rank)",
)
NEARLY = 0.95  # of the loss that LoRA takes off
ALONE: dict[str, dict[str, Any]] = {
    "B alone, r=16": {"r": 16, "variant": "lora_fa"},
    "B alone, r=32": {"r": 32, "variant": "lora_fa"},
}


def run(ground: Ground) -> Finding:
    tuned = ground.tune_alike({"LoRA, r=16": LORA} | ALONE)
    lora = tuned["LoRA, r=16"]
    shares = {name: share(tuned[name], lora) for name in ALONE}
    parts = {name: above(found, NEARLY) for name, found in shares.items()}
    said = "; ".join(
        f"{name} learns {found.mean:.1%} ({found.low:.1%} to {found.high:.1%}) of what LoRA at r=16 does: {parts[name]}"
        for name, found in shares.items()
    )
    rows = [
        {"trained": name, "best rate": own.rate, "loss": own.losses, "share of what LoRA learns": shares.get(name)}
        for name, own in tuned.items()
    ]
    return Finding(all_of(list(parts.values())), said + ".", rows)


def share(own: Tuned, lora: Tuned) -> Interval:
    """How much of the loss that LoRA takes off this one takes off, seed by seed."""
    return interval([(own.before - loss) / (lora.before - lora.losses[seed]) for seed, loss in own.losses.items()])

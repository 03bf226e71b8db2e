"""A large batch costs LoRA more than it costs full fine-tuning."""

from minilora.lab.ground.claim import Claim, Finding, above
from minilora.lab.ground.ground import BATCH, Ground
from minilora.lab.variants import LORA
from minilora.lab.verdicts.interval import told_apart

CLAIM = Claim(
    name="batch",
    sentence="From the same number of examples, a batch four times as large raises the loss of LoRA more than that of full fine-tuning.",
    source="Schulman et al. 2025, LoRA Without Regret, section on batch size effects",
    number="a gap that grows with the batch, whatever the rank",
)
TIMES = 4


def run(ground: Ground) -> Finding:
    large = {"batch_size": TIMES * BATCH, "steps": max(2, ground.steps // TIMES)}
    families = {
        f"{name}, batch {size}": fields | more
        for name, fields in (("LoRA", LORA), ("full", {"variant": "full"}))
        for size, more in ((BATCH, {}), (TIMES * BATCH, large))
    }
    tuned = ground.tune_alike(families)
    lora, lora_large, full, full_large = (own.losses for own in tuned.values())
    cost = {"LoRA": _minus(lora_large, lora), "full": _minus(full_large, full)}
    more = told_apart(cost["full"], cost["LoRA"]).interval
    means = {name: sum(by_seed.values()) / len(by_seed) for name, by_seed in cost.items()}
    said = (
        f"Batch {TIMES * BATCH} in the place of {BATCH} costs LoRA {means['LoRA']:.4f} nats a byte and full fine-tuning "
        f"{means['full']:.4f}: LoRA more by {more.mean:.4f} ({more.low:.4f} to {more.high:.4f})."
    )
    rows = [{"trained": name, "best rate": own.rate, "loss": own.losses} for name, own in tuned.items()]
    return Finding(above(more, 0), said, rows)


def _minus(one: dict[int, float], other: dict[int, float]) -> dict[int, float]:
    return {seed: one[seed] - other[seed] for seed in one}

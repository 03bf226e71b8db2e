"""Nine variants of LoRA are within 2 % of it once the rate of each is tuned."""

from typing import Any

from minilora.lab.ground.claim import FAILS, UNDECIDED, Claim, Finding, all_of, within
from minilora.lab.ground.ground import Ground
from minilora.lab.variants import families
from minilora.lab.verdicts.interval import interval

CLAIM = Claim(
    name="nine",
    sentence="At tuned rates rsLoRA, LoRA+, DoRA, PiSSA, OLoRA, orthogonal, LoRA-FA and VeRA reach the loss of LoRA within 2 %.",
    source="arXiv 2602.04998, abstract",
    number="within 1 to 2 %",
)
NINE = ("lora", "rslora", "lora+", "dora", "pissa", "olora", "orthogonal", "lora_fa", "vera")
BOUND = 0.02


def run(ground: Ground) -> Finding:
    tuned = ground.tune_alike(families(NINE))
    lora = tuned["lora"]
    rows: list[dict[str, Any]] = []
    verdicts = {}
    for name, own in tuned.items():
        apart = interval([loss / lora.losses[seed] - 1 for seed, loss in own.losses.items()])
        learnt = interval(
            [(own.before - loss) / (lora.before - lora.losses[seed]) for seed, loss in own.losses.items()]
        )
        row = {"variant": name, "best rate": own.rate, "loss": own.losses, "beside LoRA": apart}
        rows.append(row | {"share of what LoRA learns": learnt})
        if name != "lora":
            verdicts[name] = within(apart, BOUND)
    beyond = [name for name, verdict in verdicts.items() if verdict == FAILS]
    unsure = [name for name, verdict in verdicts.items() if verdict == UNDECIDED]
    widest = max(rows, key=lambda row: abs(row["beside LoRA"].mean))
    said = (
        f"Beyond 2 %: {', '.join(beyond) or 'none'}; undecided: {', '.join(unsure) or 'none'}; the farthest is {widest['variant']}, "
        f"{widest['beside LoRA'].mean:+.1%}."
    )
    return Finding(all_of(list(verdicts.values())), said, rows)

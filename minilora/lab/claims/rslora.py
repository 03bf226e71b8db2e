"""What rsLoRA gains at a large rank is what a larger learning rate gains."""

from minilora.lab.ground.claim import Claim, Finding, above, all_of, within
from minilora.lab.ground.ground import RATES, Ground, loss_picture
from minilora.lab.verdicts.interval import told_apart

CLAIM = Claim(
    name="rslora",
    sentence="At rank 64 and one small rate, alpha/sqrt(r) beats alpha/r; once the rate of each is tuned, the two cannot be told apart.",
    source="Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2",
    number="no difference at tuned rates",
)
SAME = 0.01  # nats a byte: what counts as no difference
SMALL = RATES[0]  # chosen before any run: a rate at which alpha/r has not learnt all that it can


def run(ground: Ground) -> Finding:
    families = {"alpha/r": {"r": 64}, "alpha/sqrt(r)": {"r": 64, "use_rslora": True}}
    tuned = ground.tune_alike(families)
    fixed = ground.tune(families, (SMALL,))
    plain, stable = tuned.values()
    gain = told_apart(fixed["alpha/sqrt(r)"].losses, fixed["alpha/r"].losses).interval
    left = told_apart(stable.losses, plain.losses).interval
    parts = [above(gain, 0), within(left, SAME)]
    said = (
        f"alpha/sqrt(r) gains {gain.mean:.4f} nats a byte ({gain.low:.4f} to {gain.high:.4f}) at rate {SMALL:g} for both: {parts[0]}. It "
        f"gains {left.mean:.4f} ({left.low:.4f} to {left.high:.4f}) at the best rates, {plain.rate:g} for alpha/r and {stable.rate:g}, "
        f"where {SAME} counts as nothing: {parts[1]}."
    )
    rows = [
        {"scaling": name, "best rate": own.rate, "loss there": own.losses, f"loss at {SMALL:g}": fixed[name].losses}
        for name, own in tuned.items()
    ]
    return Finding(all_of(parts), said, rows, loss_picture(tuned.values()))

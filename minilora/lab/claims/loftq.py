"""LoftQ's start helps at 2 bits and not at 4."""

from minilora.lab.ground.claim import Claim, Finding, above, all_of, below
from minilora.lab.ground.ground import Ground, Tuned, loss_picture
from minilora.lab.verdicts.interval import Interval, told_apart
from minilora.lora.starts import LoftQConfig
from minilora.quant.config import QuantConfig

CLAIM = Claim(
    name="loftq",
    sentence="Factors that make up for the rounding of the base help LoRA at 2 bits, and not at 4.",
    source="Li et al. 2023, LoftQ, arXiv 2310.08659, algorithm 1 and section 4",
    number="GSM8K, LLaMA-2-7B: 20.9 at 2 bits, where QLoRA does not converge, and 35.0 at 4, where QLoRA has 35.1",
)
HELP = 0.01  # nats a byte: a gain below this is none
TURNS = 5
# As LoftQ's layers pack their base (lora/variants/loftq.py), so that the factors are all that differs.
PLAIN = {2: QuantConfig("nf2", scale="mse"), 4: QuantConfig("nf4")}


def judged(gain: dict[int, Interval]) -> str:
    """The verdict on the gain in nats a byte by bits."""
    return all_of([above(gain[2], HELP), below(gain[4], HELP)])


def run(ground: Ground) -> Finding:
    tuned: dict[str, Tuned] = {}
    gain, before, rows = {}, {}, []
    for bits, quant in PLAIN.items():
        start = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig(bits, TURNS)}
        zero, made = f"{bits} bits, zero", f"{bits} bits, LoftQ"
        tuned |= ground.tune({zero: {}}, **ground.on(quant)) | ground.tune({made: start})
        gain[bits] = told_apart(tuned[made].losses, tuned[zero].losses).interval
        before[bits] = told_apart(tuned[made].at_first, tuned[zero].at_first).interval.mean
    for name, family in tuned.items():
        rows.append({"start": name, "best rate": family.rate, "loss before": family.at_first, "loss": family.losses})
    said = "; ".join(
        f"at {bits} bits LoftQ gains {before[bits]:.4f} nats a byte before training and {found.mean:.4f} after it "
        f"({found.low:.4f} to {found.high:.4f})"
        for bits, found in gain.items()
    )
    picture = loss_picture(tuned.values())
    return Finding(judged(gain), said[0].upper() + said[1:] + ".", rows, picture)

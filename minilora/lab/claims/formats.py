"""Of the formats of 4 bits NF4 harms a model least, and integers most.

SmolLM2's weights come from a file of Q4_1: in blocks of 32 they lie on 16 even levels from the least to the largest weight. Integers with
an offset in blocks of 32 would be exact there and measure nothing; here integers are symmetric and blocks are of 64, as in the paper.
Still one such model alone would not do, so the byte model, whose weights were never rounded to 4 bits, is judged beside it.
"""

from collections.abc import Mapping

from minilora.lab.ground.claim import FAILS, HOLDS, UNDECIDED, Claim, Finding, above, all_of
from minilora.lab.ground.ground import Ground
from minilora.lab.ground.rounding import harm
from minilora.lab.verdicts.interval import interval, told_apart
from minilora.quant.codebooks import Codebook
from minilora.quant.config import QuantConfig

CLAIM = Claim(
    name="formats",
    sentence="At 4 bits NF4 harms a model less than FP4 does, and FP4 less than INT4.",
    source="Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 4 and table 2",
    number="mean perplexity 27.41 with NF4, 29.48 and 31.07 with two FP4, 34.34 with INT4 (models of 125M to 13B)",
)
# The paper's FP4 are E2M1 and E3M0; its program has a table of its own ("fp4"), near E2M1. So three are tried.
E3M0 = Codebook(
    "e3m0", tuple(sign * level for sign in (1.0, -1.0) for level in (0, *(2.0**-k for k in range(7)))), "powers of two"
)
FLOATS = ("fp4", "e2m1", "e3m0")
ANSWERS = (HOLDS, FAILS, UNDECIDED)
FORMATS = {name: QuantConfig(name) for name in ("nf4", "fp4", "e2m1", "int4")} | {"e3m0": QuantConfig(E3M0)}


def judged(found: Mapping[str, Mapping[int, float]]) -> dict[str, str]:
    """The verdict on each step of each order, of one model: KL by format and piece of text."""
    steps = [pair for name in FLOATS for pair in (("nf4", name), (name, "int4"))]
    return {f"{good} before {bad}": above(told_apart(found[good], found[bad]).interval, 0) for good, bad in steps}


def run(ground: Ground) -> Finding:
    models = {"byte model": (ground.model, ground.prose)}
    if second := ground.second():
        models["SmolLM2"] = second
    rows, said = [], []
    verdicts: list[str] = []
    for model, (dense, text) in models.items():
        found = harm(dense, FORMATS, text)
        rows += [{"model": model, "format": name, "KL": interval(values.values())} for name, values in found.items()]
        steps = judged(found)
        verdicts += steps.values()
        means = ", ".join(f"{name} {interval(values.values()).mean:.4f}" for name, values in found.items())
        parts = (f"{how}: {', '.join(step for step in steps if steps[step] == how) or 'none'}" for how in ANSWERS)
        said.append(f"{model}: KL {means} nats a token; " + "; ".join(parts))
    if not second:
        said.append("SmolLM2 is not installed, so one model is all that was judged")
    return Finding(all_of(verdicts), ". ".join(said) + ".", rows)

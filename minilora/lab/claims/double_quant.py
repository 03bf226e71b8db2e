"""Double quantization saves bits and costs next to nothing."""

from collections.abc import Mapping

from minilora.lab.ground.claim import Claim, Finding, above, all_of, below
from minilora.lab.ground.ground import Ground
from minilora.lab.ground.rounding import harm
from minilora.lab.verdicts.interval import Interval, interval
from minilora.lora.match import ALL_LINEAR
from minilora.qlora.quantize_model import quantizable_paths
from minilora.quant.blockwise import quantize
from minilora.quant.config import QuantConfig

CLAIM = Claim(
    name="double-quant",
    sentence="Keeping the scales of NF4 in 8 bits saves 0.37 bits a weight and costs next to nothing.",
    source="Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3, Double Quantization, and section 4",
    number="0.373 bits a weight saved at blocks of 64, and no loss of performance",
)
FORMATS = {
    "NF4": QuantConfig("nf4"),
    "NF4, scales in 8 bits": QuantConfig("nf4", double_quant=True),
    "NF4, blocks of 128": QuantConfig("nf4", blocksize=128),  # the usual way to save a quarter of a bit: what bits cost
}
SAVED = 0.36  # bits a weight; small layers keep a little more beside their scales than the paper's
NOTHING = 0.1  # of the KL that NF4 costs by itself


def judged(saved: float, cost: Interval) -> str:
    """The verdict on both parts: bits saved, which are counted, and the KL added as a share of NF4's."""
    return all_of([above(Interval(saved, saved, saved), SAVED), below(cost, NOTHING)])


def run(ground: Ground) -> Finding:
    found = harm(ground.model, FORMATS, ground.prose)
    bits = {name: _bits(ground, config) for name, config in FORMATS.items()}
    plain, double, wide = FORMATS
    cost = {name: _added(found[plain], found[name]) for name in FORMATS}
    rows = [
        {
            "format": name,
            "bits a weight": bits[name],
            "KL": interval(found[name].values()),
            "KL added, share": cost[name],
        }
        for name in FORMATS
    ]
    saved = bits[plain] - bits[double]
    grown = cost[double]
    said = (
        f"{saved:.3f} bits a weight are saved, and KL grows by {grown.mean:.1%} ({grown.low:.1%} to {grown.high:.1%}); "
        f"blocks of 128 save {bits[plain] - bits[wide]:.3f} bits, and it grows by {cost[wide].mean:.1%}."
    )
    return Finding(judged(saved, grown), said, rows)


def _added(before: Mapping[int, float], after: Mapping[int, float]) -> Interval:
    """How much more KL, as a share of what it was, piece by piece of the text."""
    return interval([after[piece] / before[piece] - 1 for piece in before])


def _bits(ground: Ground, config: QuantConfig) -> float:
    """Bits a weight of all layers that are packed, counted in the packed bytes."""
    weights = [ground.model.get_submodule(path).weight for path in quantizable_paths(ground.model, ALL_LINEAR)]
    return 8 * sum(quantize(weight, config).nbytes for weight in weights) / sum(weight.numel() for weight in weights)

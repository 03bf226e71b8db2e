"""LoRA on a base of 4 bits learns as well as LoRA on a base of 16 bits."""

import torch

from minilora.lab.ground.claim import Claim, Finding, within
from minilora.lab.ground.ground import Ground, loss_picture
from minilora.lab.verdicts.interval import told_apart
from minilora.quant.config import QuantConfig

CLAIM = Claim(
    name="qlora",
    sentence="After training, LoRA on NF4 with double quantization is as good as LoRA on a base of 16 bits.",
    source="Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 4 and table 4",
    number="MMLU 53.1 with NF4 and double quantization, 53.0 with BFloat16 (mean of LLaMA 7B to 65B)",
)
COST = 0.01  # nats a byte that count as nothing
BASES = {"16 bits": None, "4 bits": QuantConfig("nf4", double_quant=True)}


def run(ground: Ground) -> Finding:
    # Both compute in bf16 with adapters in fp32, so that the packed weights are the only difference.
    tuned = {name: ground.tune({name: {}}, **ground.on(quant, torch.bfloat16))[name] for name, quant in BASES.items()}
    wide, packed = tuned["16 bits"], tuned["4 bits"]
    cost = told_apart(wide.losses, packed.losses).interval
    at_first = told_apart(wide.at_first, packed.at_first).interval.mean
    rows = [
        {"base": name, "best rate": family.rate, "loss before": family.at_first, "loss": family.losses}
        for name, family in tuned.items()
    ]
    said = (
        f"The base of 4 bits costs {at_first:.4f} nats a byte before training and {cost.mean:.4f} after it "
        f"({cost.low:.4f} to {cost.high:.4f}); best rates {wide.rate:g} and {packed.rate:g}."
    )
    return Finding(within(cost, COST), said, rows, loss_picture(tuned.values()))

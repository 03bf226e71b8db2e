"""At equal parameters, adapters on the MLP layers learn more than adapters on attention."""

from minilora.lab.ground.claim import Claim, Finding, above
from minilora.lab.ground.ground import Ground, loss_picture
from minilora.lab.verdicts.interval import told_apart

CLAIM = Claim(
    name="mlp",
    sentence="With as many trained parameters, LoRA on the MLP layers reaches a lower loss than LoRA on the attention layers.",
    source="Schulman et al. 2025, LoRA Without Regret, section on the layers to which LoRA is applied",
    number="attention-only is worse even at rank 256 against MLP-only at rank 128",
)
# Of the byte model: 24,000 parameters a layer on the MLP, and 24,192 on attention, so what is left over favours attention.
WHERE = {
    "MLP": {"r": 16, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "attention": {"r": 27, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}


def run(ground: Ground) -> Finding:
    tuned = ground.tune_alike(WHERE)
    mlp, attention = tuned.values()
    lead = told_apart(mlp.losses, attention.losses).interval
    rows = [
        {
            "layers": name,
            "r": WHERE[name]["r"],
            "parameters": own.results[own.rate][0].parameters,
            "best rate": own.rate,
            "loss": own.losses,
        }
        for name, own in tuned.items()
    ]
    said = (
        f"MLP is lower by {lead.mean:.4f} nats a byte ({lead.low:.4f} to {lead.high:.4f}), with {rows[0]['parameters']:,} parameters "
        f"against {rows[1]['parameters']:,}."
    )
    picture = loss_picture(tuned.values())
    return Finding(above(lead, 0), said, rows, picture)

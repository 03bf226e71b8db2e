"""What LoRA and LoRA-FA keep for the backward pass, counted.

The gradient of A needs the layer's input, which LoRA keeps; LoRA-FA freezes A and keeps ``A x``, r numbers a token, as LoRA does too. That
saves what nothing else keeps: the base is frozen, and ``lora_linear`` keeps no input that no gradient asks for.
"""

from typing import Any

import torch
from torch import Tensor

from minilora.lab.ground.by_hand import adapted, batches, mean_loss
from minilora.lab.ground.claim import FAILS, HOLDS, Claim, Curve, Finding, Picture, all_of
from minilora.lab.ground.ground import Ground

CLAIM = Claim(
    name="fa-memory",
    sentence="The activation memory of LoRA does not depend on the rank, nor does that of LoRA-FA, which is 1.4 times smaller.",
    source="Zhang et al. 2023, LoRA-FA, arXiv 2308.03303, section 3 and abstract",
    number="up to 1.4 times less, of all memory of a run",
    exact=True,
)
KINDS = {"LoRA": "lora", "LoRA-FA": "lora_fa"}
RANKS = (1, 4, 16, 64)  # at 64, r is half of the model's width; models in use have widths of thousands
GROWTH = 0.05  # from the first rank to the last: more than this depends on the rank
LESS = 1.4


def run(ground: Ground) -> Finding:
    (batch,) = batches(ground, 0, 1)
    kept = {(name, r): kept_bytes(adapted(ground, 0, kind, r=r), batch) for name, kind in KINDS.items() for r in RANKS}
    rows: list[dict[str, Any]] = [
        {"r": r} | {f"{name}, MB": kept[name, r] / 1e6 for name in KINDS} | {"ratio": kept["LoRA", r] / kept["LoRA-FA", r]}
        for r in RANKS
    ]  # fmt: skip
    growth = {name: kept[name, RANKS[-1]] / kept[name, RANKS[0]] - 1 for name in KINDS}
    parts = {f"{name} does not depend on r": HOLDS if growth[name] <= GROWTH else FAILS for name in KINDS}
    parts["LoRA-FA keeps 1.4 times less"] = HOLDS if max(row["ratio"] for row in rows) >= LESS else FAILS
    said = "; ".join(
        f"{name} keeps {grown:.1%} more at r={RANKS[-1]} than at r={RANKS[0]}" for name, grown in growth.items()
    )
    said += f"; LoRA keeps {rows[0]['ratio']:.2f} times as much as LoRA-FA at r={RANKS[0]} and {rows[-1]['ratio']:.2f} at r={RANKS[-1]}. "
    said += ", ".join(f"{part}: {verdict}" for part, verdict in parts.items()) + "."
    curves = [Curve(name, [_exact(r, kept[name, r] / 1e6) for r in RANKS]) for name in KINDS]
    return Finding(
        all_of(list(parts.values())), said, rows, Picture("r", "kept for the backward pass (MB)", curves, log_x=True)
    )


def kept_bytes(model: Any, batch: dict[str, Tensor]) -> int:
    """The bytes that a training pass keeps from forward to backward, without the weights: whole storages, each once."""
    weights = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # held by the graph, so that no other storage gets its address

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = mean_loss(model, batch)
    loss.backward()
    return sum(kept.values())


def _exact(x: float, y: float) -> tuple[float, float, float, float]:
    """A point that nothing is uncertain about."""
    return x, y, y, y

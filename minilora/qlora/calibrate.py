"""What flows into each linear layer: E[x^2] per input channel, gathered while text runs through the model.

An error in a weight disturbs the output in proportion to the input it meets, so ``QuantConfig(scale="weighted")`` counts it with this
mean square. Only one vector a layer is kept, whatever the amount of text; a few thousand tokens suffice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import QuantizationError
from minilora.linear.experts.layers import is_experts
from minilora.lora.bare import Bare
from minilora.lora.change import Change
from minilora.lora.match import ALL_LINEAR
from minilora.lora.slots import unwrapped
from minilora.lora.targets import Selection
from minilora.qlora.quantize_model import quantizable_paths

__all__ = ["calibrate"]


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Iterable[Tensor | Mapping[str, Any]], target_modules: Selection = ALL_LINEAR
) -> dict[str, Tensor]:
    """Mean square of each input channel of every linear layer that ``quantize_model`` would pack; experts are left out.

    Args:
        model: dense; runs in eval mode and is otherwise untouched.
        batches: token ids ``[batch, length]``, or dicts of keyword arguments; a mask named ``attention_mask`` leaves padding out.
        target_modules: as for ``quantize_model``.

    Returns:
        Path to ``[in]`` fp32.

    Raises:
        QuantizationError: no batch, one that is no tensor or dict, or a layer that never ran.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    kept: list[Tensor | None] = [None]  # which tokens of the running batch count

    def listen(path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            if kept[0] is not None and len(kept[0]) == len(rows):
                rows = rows[kept[0]]
            sums[path] = sums.get(path, torch.zeros((), dtype=torch.float32, device=rows.device)) + rows.square().sum(0)
            counts[path] = counts.get(path, 0) + len(rows)

        return hook

    bare = Bare(model)
    paths = [path for path in quantizable_paths(model, target_modules) if not is_experts(bare.get_submodule(path))]
    change = Change()
    try:
        try:  # twice, so that an interrupt on the way out cannot leave a hook
            for path in paths:
                change.item(unwrapped(model).get_submodule(path)._forward_pre_hooks, "minilora.calibrate", listen(path))  # type: ignore[arg-type]
            change.train(model, False)
            for batch in batches:
                if not isinstance(batch, (Tensor, Mapping)):
                    raise QuantizationError(
                        f"calibrate: a batch is a {type(batch).__name__}; wanted token ids [batch, length], or a dict of arguments"
                    )
                options = dict(batch) if isinstance(batch, Mapping) else {}
                mask = options.get("attention_mask")
                kept[0] = None if mask is None else mask.reshape(-1).bool()
                model(**options) if options else model(batch)
        finally:
            change.take_back()
    finally:
        change.take_back()
    silent = [path for path in paths if not counts.get(path)]
    if silent:
        raise QuantizationError(f"calibrate: {silent[0]} saw no input; give at least one batch that runs every layer")
    return {path: sums[path] / counts[path] for path in paths}

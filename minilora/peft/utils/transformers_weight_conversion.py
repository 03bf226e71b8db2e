"""How transformers' own ``model.load_adapter`` finds where the tensors of an adapter's file go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["build_peft_weight_mapping"]


def build_peft_weight_mapping(
    weight_conversions: Sequence[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The renamings of an adapter's tensors: PEFT's prefix goes, the adapter's name comes in, and the base model's own follow.

    Args:
        weight_conversions: the base model's ``WeightRenaming`` and ``WeightConverter`` objects. The latter fuse experts, whose adapters
            are laid out by ``PeftModel.from_pretrained`` and not here: transformers refuses their shapes by name.
        peft_config: PEFT's; there is one method.
    """
    from transformers.core_model_loading import WeightRenaming

    renamed = [each for each in weight_conversions or () if isinstance(each, WeightRenaming)]
    return [
        WeightRenaming("base_model.model.model.", "model."),
        WeightRenaming("base_model.model.", ""),
        WeightRenaming(r"(lora_[^\.]*)", rf"\1.{adapter_name}"),
        *renamed,
    ]

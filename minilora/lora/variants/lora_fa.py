"""LoRA-FA (Zhang et al. 2023, arXiv 2308.03303, section 3): A stays as it was drawn, only B trains.

The backward pass then needs ``A x`` (r numbers a token) instead of ``x`` (in numbers a token).
"""

from __future__ import annotations

from typing import ClassVar

from minilora.lora.adapter import register
from minilora.lora.layer import LoRALinear


@register("lora_fa")
class LoRAFALinear(LoRALinear):
    """LoRA with a frozen A."""

    fixed: ClassVar[frozenset[str]] = frozenset({"lora_A"})

"""The variants of LoRA, one file each; importing this package registers them all. ``minilora.register`` comes from here, after them."""

from minilora.lora.adapter import register
from minilora.lora.variants import (
    corda,
    dora,
    embedding,
    loftq,
    lora_fa,
    lora_ga,
    mica,
    olora,
    orthogonal,
    pissa,
    tokens,
    vera,
)

__all__ = [
    "corda",
    "dora",
    "embedding",
    "loftq",
    "lora_fa",
    "lora_ga",
    "mica",
    "olora",
    "orthogonal",
    "pissa",
    "register",
    "tokens",
    "vera",
]

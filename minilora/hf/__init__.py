"""All that knows transformers: loading models, asking them, and (elsewhere in this folder) joining their Trainer."""

from typing import Any

from minilora.hf.generate import answers
from minilora.hf.load import load_model, load_tokenizer, resolve


def __getattr__(name: str) -> Any:
    """The trainer and the quantizer import transformers, so they are loaded when they are asked for."""
    if name in ("LoraTrainer", "LoraTrainerMixin"):
        from minilora.hf import trainer

        return getattr(trainer, name)
    if name == "NF4Config":
        from minilora.hf.quantizer import NF4Config

        return NF4Config
    raise AttributeError(f"module 'minilora.hf' has no attribute {name!r}")


__all__ = ["LoraTrainer", "LoraTrainerMixin", "NF4Config", "answers", "load_model", "load_tokenizer", "resolve"]

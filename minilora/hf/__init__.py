"""All that knows transformers: loading models, asking them, and (elsewhere in this folder) joining their Trainer."""

from typing import Any

from minilora.hf.generate import answers
from minilora.hf.load import load_model, load_tokenizer, resolve


def __getattr__(name: str) -> Any:
    """The trainer imports transformers, so it is loaded when it is asked for."""
    if name in ("LoraTrainer", "LoraTrainerMixin"):
        from minilora.hf import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'minilora.hf' has no attribute {name!r}")


__all__ = ["LoraTrainer", "LoraTrainerMixin", "answers", "load_model", "load_tokenizer", "resolve"]

"""All that knows transformers: loading models, asking them, and (elsewhere in this folder) joining their Trainer."""

from minilora.hf.generate import answers
from minilora.hf.load import load_model, load_tokenizer, resolve

__all__ = ["answers", "load_model", "load_tokenizer", "resolve"]

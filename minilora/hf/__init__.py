"""All that knows transformers: loading models, asking them, and (elsewhere in this folder) joining their Trainer.

A name is imported when it is asked for. ``__init__.pyi`` has the same names for mypy and editors.
"""

from minilora.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "minilora.hf.generate": ("answers",),
        "minilora.hf.load": ("load_model", "load_tokenizer", "resolve"),
        "minilora.hf.quantizer": ("NF4Config",),  # importing it makes the quantizer known to transformers
        "minilora.hf.began": ("Reference", "reference"),
        "minilora.hf.trainer": ("LoraTrainer", "LoraTrainerMixin"),
    },
)

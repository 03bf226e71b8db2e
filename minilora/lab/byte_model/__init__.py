"""A byte-level language model of 0.8 million parameters that comes with the package, and texts to fine-tune it on, offline.

The weights (``model.safetensors``) were made by ``train.py`` and are released under CC0 1.0 (``LICENSE.txt``). Read ``texts.py`` first.
"""

from minilora.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "minilora.lab.byte_model.model": ("byte_model",),
        "minilora.lab.byte_model.texts": (
            "code",
            "decode",
            "docs",
            "encode",
            "facts",
            "line_examples",
            "sums",
            "text_examples",
        ),
    },
)

"""The base model of an adapter, if it is on this disk: looked for without the network, and built without memory.

Next file: ``hf/load.py``.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minilora.errors import MiniLoraError
from minilora.files.hub import cached
from minilora.gguf.file import gguf_in
from minilora.hf.load import skeleton
from minilora.hf.smollm2 import HUB_NAME, PACKAGE, SMOLLM2, SMOLLM2_GGUF, cache_folder
from minilora.lora.bare import Bare
from minilora.lora.coverage import linear_weights

__all__ = ["linear_layers", "on_disk"]


def on_disk(name: str | None) -> str | None:
    """Where the config of the model of that name is, or None: a local folder or GGUF file, smollm2, or the Hub's cache."""
    if not name:
        return None
    if name in (HUB_NAME, SMOLLM2):
        converted = cache_folder() / "smollm2-135m-instruct"
        if converted.is_dir():
            return str(converted)
    if name == SMOLLM2_GGUF:
        return name if find_spec(PACKAGE) else None
    if (Path(name) / "config.json").is_file() or (Path(name).exists() and gguf_in(name)):
        return name
    found = cached(name, "config.json")
    return None if found is None else str(found.parent)


def linear_layers(name: str | None) -> list[str] | None:
    """Paths of the linear layers and convolutions of a model, by its config alone; None if it is not here or cannot be built."""
    place = on_disk(name)
    if place is None or find_spec("transformers") is None:
        return None
    try:
        model: Any = skeleton(place)
    except MiniLoraError:
        return None
    return list(linear_weights(Bare(model)))

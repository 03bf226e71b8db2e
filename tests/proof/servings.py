"""What a llama.cpp server can make of the sealed adapter of this folder: every serving that ``minilora verify`` is tried on.

``test_served.py`` asks whether each is told apart, ``benchmarks/verify.py`` measures how far it is off.
"""

from pathlib import Path
from typing import NamedTuple

from minilora.export.stored import stored_factors
from minilora.store.adapter_files import read_adapter
from tests.gguf_llama import write_lora, write_model
from tests.models import CHATML, byte_tokenizer
from tests.proof.conftest import adapted, base


class Serving(NamedTuple):
    """The base's file and the adapter's by ``written``'s names ("" for none), the adapter's scale; the verdict, and the fitted scale (None
    for any).
    """

    base: str
    adapter: str
    scale: float
    kind: str
    fitted: float | None = None


SERVINGS = {
    "the adapter on its base": Serving("F32", "own", 1.0, "right", 1.0),
    "on its base in half precision": Serving("F16", "own", 1.0, "right", 1.0),
    "no adapter": Serving("F32", "", 1.0, "not applied", 0.0),
    "scale halved": Serving("F32", "own", 0.5, "scale", 0.5),
    "scale 0.8": Serving("F32", "own", 0.8, "scale", 0.8),
    # Between 1 and 1.5, where no scale is measured, what the interpolation finds is coarser.
    "scale 1.3": Serving("F32", "own", 1.3, "scale", 1.37),
    "down_proj left out": Serving("F32", "no down_proj", 1.0, "misread"),
    "rsLoRA read as lora_alpha / r": Serving("F32", "over r", 1.0, "misread"),
    "another adapter": Serving("F32", "other", 1.0, "another adapter or base"),
    "another base": Serving("other base", "own", 1.0, "another adapter or base"),
    "another base, no adapter": Serving("other base", "", 1.0, "another base"),
    "another chat template": Serving("other template", "own", 1.0, "another template", 1.0),
    "base in Q8_0": Serving("Q8_0", "own", 1.0, "another packing", 1.0),
    "base in Q4_0": Serving("Q4_0", "own", 1.0, "another packing", 1.0),
    "base in Q4_0, no adapter": Serving("Q4_0", "", 1.0, "not applied", 0.0),
    "base in Q4_0, scale halved": Serving("Q4_0", "own", 0.5, "scale", 0.5),
}


def written(name: str, folder: Path, place: Path) -> Path | None:
    """The GGUF file of this name in ``place``, written if it is not there; ``folder`` has the adapter. None for ""."""
    path = place / f"{name}.gguf"
    if path.exists() or not name:
        return path if name else None
    tokenizer, config = byte_tokenizer(), base().config
    if name == "other":
        adapted(5).save_pretrained(place / "other")
        write_lora(stored_factors(read_adapter(place / "other"), "llama.cpp"), config, path)
    elif name in ("own", "no down_proj", "over r"):
        factor = 3**-0.5 if name == "over r" else 1.0  # of lora_alpha / r to lora_alpha / sqrt(r), r = 3
        left_out = "down_proj" if name == "no down_proj" else "nothing"
        own = stored_factors(read_adapter(folder), "llama.cpp")
        write_lora(own, config, path, lambda layer: 0.0 if left_out in layer else factor)
    elif name == "other base":
        write_model(base(7), tokenizer, path)
    elif name == "other template":
        write_model(base(), tokenizer, path, template=CHATML.replace("assistant\n", "assistant\n\n"))
    else:
        write_model(base(), tokenizer, path, name)
    return path

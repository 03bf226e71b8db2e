"""``minilora quantize``: a model read dense, packed, and written as a folder that bitsandbytes' users can open too."""

from __future__ import annotations

from pathlib import Path

import torch

from minilora.data.encoding import encode_all
from minilora.data.records import read_jsonl
from minilora.errors import ConfigError
from minilora.hf.folders import in_new_folder, refuse_occupied
from minilora.hf.load import load_model, load_tokenizer
from minilora.hf.packed import write_packed
from minilora.qlora.calibrate import calibrate
from minilora.qlora.quantize_model import quantize_model
from minilora.quant.bnb import storable
from minilora.quant.codebooks import codebook
from minilora.quant.config import QuantConfig

__all__ = ["quantize_to_folder"]

_CALIBRATION_LENGTH = 512  # tokens of an example that are read


def quantize_to_folder(
    model: str,
    out: str,
    config: QuantConfig,
    calibration: str | None = None,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> int:
    """Load a model, pack its linear layers, and save it with its tokenizer; returns the bytes of its weights.

    Args:
        calibration: JSONL file of text like what the model will read, for ``scale="weighted"``.
        trust_remote_code: as for ``load_model``.

    Raises:
        ConfigError: weighted scales without calibration text, or a format that the folder cannot hold. CheckpointError: ``out`` holds
            something already.
    """
    target = refuse_occupied(out)
    if not storable(config.format, config.blocksize):
        raise ConfigError(
            f"format={codebook(config.format).name!r}, blocksize={config.blocksize}: bitsandbytes' files cannot hold that; wanted nf4 or "
            "fp4, blocksize 64 to 4096"
        )
    if config.scale == "weighted" and calibration is None:
        raise ConfigError("scale='weighted' wants text to calibrate on; give --calibration FILE.jsonl")
    records = read_jsonl(calibration) if calibration else []
    loaded, tokenizer = load_model(model, dtype, trust_remote_code), load_tokenizer(model, trust_remote_code)
    importance = None
    if config.scale == "weighted":
        examples = encode_all(records, tokenizer, _CALIBRATION_LENGTH)
        importance = calibrate(loaded, [torch.tensor([example.input_ids]) for example in examples])
    quantize_model(loaded, config, importance=importance)

    def write(folder: Path) -> None:
        write_packed(loaded, folder)
        tokenizer.save_pretrained(folder)

    in_new_folder(target, write)
    return (target / "model.safetensors").stat().st_size

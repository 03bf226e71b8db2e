"""``minilora quantize``: a model read dense, packed, and written as a folder; of nf4 and fp4 one that bitsandbytes' users can open too."""

from __future__ import annotations

from pathlib import Path

import torch

from minilora.data.encoding import encode_all
from minilora.data.records import read
from minilora.errors import ConfigError, TargetError
from minilora.hf.folders import in_new_folder, refuse_occupied
from minilora.hf.load import load_model, load_tokenizer, resolve
from minilora.hf.packed import is_packed_folder, write_packed
from minilora.qlora.calibrate import calibrate
from minilora.qlora.quantize_model import quantize_model
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
    device: torch.device | str = "cpu",
) -> int:
    """Load a model, its linear layers packed on the way, and save it with its tokenizer; returns the bytes of its weights.

    Args:
        calibration: JSONL file of text like what the model will read, for ``scale="weighted"``: the dense model reads it, so that this
            scale alone wants memory for the dense model.
        trust_remote_code, device: as for ``load_model``.

    Raises:
        ConfigError: weighted scales without calibration text. CheckpointError: ``out`` holds
            something already.
    """
    target = refuse_occupied(out)
    if config.scale == "weighted" and calibration is None:
        raise ConfigError("scale='weighted' wants text to calibrate on; give --calibration FILE.jsonl")
    if is_packed_folder(resolve(model)):
        raise TargetError(
            f"model {model!r}: is packed already, no dense linear layer is left to quantize; name the dense model"
        )
    records = read(calibration) if calibration else []
    tokenizer = load_tokenizer(model, trust_remote_code)
    if config.scale == "weighted":
        loaded = load_model(model, dtype, trust_remote_code, device=device)
        examples = encode_all(records, tokenizer, _CALIBRATION_LENGTH, truncate=True)
        texts = [torch.tensor([example.input_ids], device=loaded.device) for example in examples]
        quantize_model(loaded, config, importance=calibrate(loaded, texts))
    else:
        loaded = load_model(model, dtype, trust_remote_code, device=device, quant=config)

    def write(folder: Path) -> None:
        write_packed(loaded, folder)
        tokenizer.save_pretrained(folder)

    in_new_folder(target, write)
    return (target / "model.safetensors").stat().st_size

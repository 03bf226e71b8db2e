"""PEFT, and bitsandbytes under it, doing the job of ``hf/bench.py``; the one file of the package that imports them, in a worker only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minilora.hf.bench import BenchJob, contestant
from minilora.hf.finetune import DTYPES
from minilora.hf.load import load_model, resolve

__all__ = ["serve"]


def serve(settings: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """PEFT's side, as its documentation says to do it."""
    import peft

    versions = {"PEFT": peft.__version__}
    if settings["quant"] != "none":
        import bitsandbytes

        versions["bitsandbytes"] = bitsandbytes.__version__

    def load(job: BenchJob) -> Any:
        model = _dense(job) if job.quant == "none" else _in_four_bits(job)
        return peft.PeftModel.from_pretrained(model, settings["start"], is_trainable=True)

    return contestant(settings, versions, load)


def _dense(job: BenchJob) -> Any:
    return load_model(job.model, DTYPES[job.dtype], job.trust_remote_code)


def _in_four_bits(job: BenchJob) -> Any:
    import transformers

    dtype = DTYPES[job.dtype]
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=job.quant,
        bnb_4bit_use_double_quant=job.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        resolve(job.model),
        quantization_config=config,
        dtype=dtype,
        device_map="cpu",
        use_safetensors=True,
        trust_remote_code=job.trust_remote_code,
    )

"""PEFT, and bitsandbytes under it, doing the job of ``hf/bench.py``; the one file of the package that imports them, in a worker only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minilora.hf.bench import BenchJob, contestant
from minilora.hf.load import resolve
from minilora.hf.places import AUTO
from minilora.hf.plan import load_trial, on_this_machine

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

    return contestant(settings, versions, load, lambda model, folder: model.save_pretrained(folder))


def _dense(job: BenchJob) -> Any:
    return load_trial(*on_this_machine(job))


def _in_four_bits(job: BenchJob) -> Any:
    import transformers

    place = on_this_machine(job)[1]
    chosen = {} if job.attention == AUTO else {"attn_implementation": job.attention}
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=job.quant,
        bnb_4bit_use_double_quant=job.double_quant,
        bnb_4bit_compute_dtype=place.dtype,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        resolve(job.model),
        quantization_config=config,
        dtype=place.dtype,
        device_map={"": place.device},
        use_safetensors=True,
        trust_remote_code=job.trust_remote_code,
        **chosen,
    )

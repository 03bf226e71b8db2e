"""Plan a fine-tuning job's memory: the model from its config alone for the prediction, a real step in another process beside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import CheckpointError, ConfigError
from minilora.hf.finetune import DTYPES
from minilora.hf.folders import read_config
from minilora.hf.load import load_model, resolve
from minilora.hf.packed import is_packed_folder
from minilora.hf.trials import PlanJob
from minilora.linear.layers import is_quantized
from minilora.lora.inject import inject
from minilora.measure.plan import Memory, measure, pack_on_paper, predict
from minilora.measure.worker import Worker
from minilora.qlora.kbit import checkpoint_activations
from minilora.qlora.quantize_model import quantize_model
from minilora.quant.codebooks import ON_DISK
from minilora.quant.config import QuantConfig
from minilora.training.losses import token_losses

__all__ = ["PlanJob", "has_weights", "load_config", "measured_in_worker", "model_on_meta", "predicted"]


def predicted(job: PlanJob) -> tuple[Memory, int]:
    """``(the peak of a step, bytes of the dense weights)``; nothing of the model's size is allocated."""
    model = model_on_meta(job)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    quant = _quantization(job)
    return predict(_adapted(job, pack_on_paper(model, quant) if quant else model), _loss_of(job, model)), dense


def measured_in_worker(job: PlanJob) -> Memory:
    """The same, of a real step in a process of its own. Raises ``StateError`` where that cannot be measured."""
    with Worker("minilora.hf.plan:_serve", dataclasses.asdict(job), job.threads) as worker:
        return Memory(worker.ask("measure")["parts"])


def _serve(settings: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    targets = settings["target_modules"]
    job = PlanJob(**settings | {"target_modules": targets if isinstance(targets, str) else tuple(targets)})

    def load() -> nn.Module:
        full = has_weights(job.model)
        model = load_model(job.model, DTYPES[job.dtype], job.trust_remote_code) if full else _random_model(job)
        if job.quant != "none" and not any(is_quantized(module) for module in model.modules()):
            quantize_model(model, QuantConfig(job.quant, double_quant=job.double_quant))
        return model

    def answer(request: str) -> dict[str, Any]:
        paper = model_on_meta(job)  # imports what loading will import
        return {"parts": measure(load, lambda model: _adapted(job, model), _loss_of(job, paper)).parts}

    return answer


def has_weights(model: str) -> bool:
    """False for a local folder that holds a config and no weights: a step is then measured with random ones."""
    place = Path(resolve(model))
    return not place.is_dir() or any(any(place.glob(kind)) for kind in ("*.safetensors", "*.bin"))


def load_config(job: PlanJob) -> Any:
    """The model's config, without what it says of quantization."""
    config = read_config(resolve(job.model), job.model, job.trust_remote_code)
    limit = getattr(config, "max_position_embeddings", None)
    if limit and job.seq > limit:
        raise ConfigError(f"seq={job.seq}: {job.model} reads at most {limit} tokens; lower --seq")
    return config


def _random_model(job: PlanJob) -> Any:
    import transformers

    options: dict[str, Any] = {"dtype": DTYPES[job.dtype], "trust_remote_code": job.trust_remote_code}
    return transformers.AutoModelForCausalLM.from_config(load_config(job), **options).eval()


def model_on_meta(job: PlanJob) -> Any:
    """The model without memory, not yet packed."""
    with torch.device("meta"):
        return _random_model(job)


def _quantization(job: PlanJob) -> QuantConfig | None:
    """How the weights will be packed; a folder that is packed already says so itself."""
    place = resolve(job.model)
    if is_packed_folder(place):
        said = json.loads((Path(place) / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        kind, nested = said.get("bnb_4bit_quant_type"), said.get("bnb_4bit_use_double_quant", False)
        if kind not in ON_DISK or not isinstance(nested, bool):
            raise CheckpointError(
                f"model {job.model!r}: its config.json says that it is packed as {str(kind)[:100]!r}, double quantization "
                f"{str(nested)[:100]}; wanted {' or '.join(ON_DISK)}, and true or false"
            )
        return QuantConfig(kind, double_quant=nested)
    return None if job.quant == "none" else QuantConfig(job.quant, double_quant=job.double_quant)


def _adapted(job: PlanJob, model: Any) -> Any:
    inject(model, job.lora())
    if job.gradient_checkpointing:
        checkpoint_activations(model)
    return model


def _loss_of(job: PlanJob, model: Any) -> Callable[[nn.Module], Tensor]:
    """The trainer's loss on a batch of random tokens; its values do not matter to memory."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (job.batch, job.seq), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    return lambda model: token_losses(model, batch).sum() / (job.batch * (job.seq - 1))

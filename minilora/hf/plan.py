"""Plan a fine-tuning job's memory: the model from its config alone for the prediction, a real step in another process beside it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minilora.errors import ConfigError
from minilora.gguf.file import gguf_in, has_blocks
from minilora.hf.devices import Place, choose, settled
from minilora.hf.gguf_model import gguf_skeleton
from minilora.hf.load import load_model, model_config, resolve
from minilora.hf.packed import is_packed_folder, packing_said
from minilora.hf.places import AUTO, packing
from minilora.hf.trials import PlanJob
from minilora.lora.bare import Bare
from minilora.lora.inject import inject
from minilora.lora.match import ALL_LINEAR
from minilora.measure.plan import Memory, measure, pack_on_paper, predict, while_packed
from minilora.measure.worker import Worker
from minilora.qlora.kbit import checkpoint_activations
from minilora.qlora.quantize_model import quantizable_paths, quantize_model
from minilora.quant.config import QuantConfig
from minilora.training.losses import token_losses

__all__ = [
    "PlanJob", "has_weights", "load_config", "load_trial", "measured_in_worker", "model_on_meta", "on_this_machine", "predicted",
]  # fmt: skip


Asked = TypeVar("Asked", bound=PlanJob)


def predicted(job: PlanJob) -> Memory:
    """The peak of a step, and of loading; nothing of the model's size is allocated. A step is counted as a CPU does it, on any device."""
    job, _ = on_this_machine(job)
    model, quant, dense = model_on_meta(job), _quantization(job), []
    if quant and not is_packed_folder(resolve(job.model)):
        bare = Bare(model)
        dense = [bare.get_parameter(f"{path}.weight") for path in quantizable_paths(model, ALL_LINEAR)]
    file = gguf_in(resolve(job.model))
    if file and has_blocks(file):
        frozen = gguf_skeleton(file, getattr(torch, job.dtype), packed=True)
    else:
        frozen = pack_on_paper(model, quant) if quant else model
    loading = while_packed(frozen, dense) if frozen is not model or quant else 0
    return dataclasses.replace(predict(_adapted(job, frozen), _loss_of(job, model)), loading=loading)


def on_this_machine(job: Asked) -> tuple[Asked, Place]:
    """The job with its device and dtype chosen, and the choice. Raises as ``devices.choose``."""
    place = choose(job.device, job.dtype, job.attention)
    return settled(job, place), place


def measured_in_worker(job: PlanJob) -> Memory:
    """The same, of a real step in a process of its own. Raises ``StateError`` where that cannot be measured."""
    with Worker("minilora.hf.plan:_serve", dataclasses.asdict(job), job.threads) as worker:
        return Memory(worker.ask("measure")["parts"])


def _serve(settings: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    targets = settings["target_modules"]
    job = PlanJob(**settings | {"target_modules": targets if isinstance(targets, str) else tuple(targets)})
    job, place = on_this_machine(job)

    def load() -> nn.Module:
        quant = packing(job.quant, job.double_quant)
        if has_weights(job.model):
            return load_trial(job, place)
        model = _random_model(job).to(place.device)
        return quantize_model(model, quant) if quant else model

    def answer(request: str) -> dict[str, Any]:
        paper = model_on_meta(job)  # imports what loading will import
        adapt = functools.partial(_adapted, job)
        return {"parts": measure(load, adapt, _loss_of(job, paper), place.device).parts}

    return answer


def load_trial(job: PlanJob, place: Place) -> Any:
    """The frozen model that a job tries."""
    options: dict[str, Any] = {"device": place.device, "attention": job.attention}
    quant = packing(job.quant, job.double_quant)
    return load_model(job.model, place.dtype, job.trust_remote_code, quant=quant, **options)


def has_weights(model: str) -> bool:
    """False for a local folder that holds a config and no weights: a step is then measured with random ones."""
    place = Path(resolve(model))
    return (
        not place.is_dir()
        or gguf_in(place) is not None
        or any(any(place.glob(kind)) for kind in ("*.safetensors", "*.bin"))
    )


def load_config(job: PlanJob) -> Any:
    """The model's config, without what it says of quantization."""
    config = model_config(job.model, job.trust_remote_code)
    limit = getattr(config, "max_position_embeddings", None)
    if limit and job.seq > limit:
        raise ConfigError(f"seq={job.seq}: {job.model} reads at most {limit} tokens; lower --seq")
    return config


def _random_model(job: PlanJob) -> Any:
    import transformers

    options: dict[str, Any] = {"dtype": getattr(torch, job.dtype), "trust_remote_code": job.trust_remote_code}
    options |= {} if job.attention == AUTO else {"attn_implementation": job.attention}
    return transformers.AutoModelForCausalLM.from_config(load_config(job), **options).eval()


def model_on_meta(job: PlanJob) -> Any:
    """The model without memory, not yet packed."""
    with torch.device("meta"):
        return _random_model(job)


def _quantization(job: PlanJob) -> QuantConfig | None:
    """How the weights will be packed; a folder that is packed already says so itself."""
    place = resolve(job.model)
    if is_packed_folder(place):
        return None if gguf_in(place) else packing_said(place)
    return packing(job.quant, job.double_quant)


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

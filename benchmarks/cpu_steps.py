"""How long does a fine-tuning step of SmolLM2 take with minilora's adapters, beside PEFT's? Run by ``cpu.py``.

Both libraries load one adapter file and see the same tokens; their losses are compared before anything is timed.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from comparison import Row, Setting, interleave
from torch import nn

import minilora
from minilora import QuantConfig

R, BATCH, LENGTH = 16, 4, 128
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def smollm2(layers: int, dtype: torch.dtype, packed: str = "") -> Any:
    """The model with its first ``layers`` layers, trained mode; ``packed`` by "ours" or "peer": NF4 with double quantization."""
    from minilora.hf import load_model

    model = load_model("smollm2", dtype)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.config.use_cache = False
    model.requires_grad_(False)
    if packed == "ours":
        minilora.quantize_model(model, QuantConfig("nf4", double_quant=True))
    elif packed == "peer":
        _pack_as_bitsandbytes(model, dtype)
    return model.train()


def _pack_as_bitsandbytes(model: Any, dtype: torch.dtype) -> None:
    import bitsandbytes as bnb

    for path, layer in [(p, m) for p, m in model.model.named_modules() if isinstance(m, nn.Linear)]:
        options = {"quant_type": "nf4", "compress_statistics": True}
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, **options)
        new.weight = bnb.nn.Params4bit(layer.weight.detach().clone(), requires_grad=False, **options)
        parent, _, name = path.rpartition(".")
        setattr(model.model.get_submodule(parent), name, new.to("cpu"))


@contextlib.contextmanager
def adapter_folder(layers: int, dropout: float) -> Iterator[str]:
    """An adapter with random A and B, which both libraries load; its folder is removed after."""
    model = smollm2(layers, torch.float32)
    config = minilora.LoraConfig(
        r=R, lora_alpha=2 * R, lora_dropout=dropout, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"
    )
    minilora.get_peft_model(model, config)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01, generator=draw)
    with tempfile.TemporaryDirectory(prefix="minilora-bench-") as folder:
        model.save_pretrained(folder)
        yield folder


class Steps:
    """A model and its optimizer: ``step()`` is forward, backward and AdamW on one batch of 4 x 128 tokens."""

    def __init__(self, library: str, layers: int, dtype: torch.dtype, packed: bool, folder: str = "") -> None:
        import peft

        side = "ours" if library in ("ours", "floor") else "peer"
        self.model = smollm2(layers, dtype, side if packed else "")
        if library == "ours":
            self.model = minilora.PeftModel.from_pretrained(self.model, folder, is_trainable=True)
        elif library == "peer":
            self.model = peft.PeftModel.from_pretrained(self.model, folder, is_trainable=True)
        else:  # the frozen model alone, the gradient going all the way down
            self.model.enable_input_require_grads()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
        self.tokens = torch.randint(0, 49152, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.tokens, labels=self.tokens).loss

    def step(self) -> float:
        loss = self.loss()
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()


def rows_step(setting: Setting, dtype: torch.dtype, packed: bool, layers: int, goals: dict[str, str]) -> Iterator[Row]:
    """Time of a step, and of what the adapters add to the frozen model; equal losses first."""
    layers = setting.layers(layers)
    names = ["ours", "peer", *(["floor", *(["peer floor"] if packed else [])] if "overhead" in goals else [])]
    with adapter_folder(layers, 0.0) as folder:
        models = {name: Steps(name, layers, dtype, packed, folder) for name in names}
    first = {name: models[name].step() for name in ("ours", "peer")}
    if abs(first["ours"] - first["peer"]) > (1e-4 if dtype == torch.float32 else 3e-2) * first["peer"]:
        raise RuntimeError(f"the losses differ: {first}")
    samples = interleave({name: model.step for name, model in models.items()}, setting.rounds)
    kind = str(dtype).removeprefix("torch.").replace("float32", "fp32").replace("bfloat16", "bf16")
    said = f"SmolLM2, {layers} of 30 layers, all-linear r={R}, {BATCH}x{LENGTH}; loss {first['ours']:.4f} / {first['peer']:.4f}"
    name = f"{'QLoRA' if packed else 'LoRA'} step, {kind}"
    if "time" in goals:
        yield Row(name, goals["time"], "time", samples, said)
    if "overhead" in goals:
        samples.setdefault("peer floor", samples["floor"])
        yield Row(f"{name}, cost over the frozen model", goals["overhead"], "overhead", samples, said)

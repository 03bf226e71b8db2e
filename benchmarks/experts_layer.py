"""One layer of experts as each side computes it: minilora's adapters, PEFT's, the frozen layer, and packed codes. Run by ``experts.py``.

The module is transformers' of Qwen3-MoE, alone in a wrapper, with random weights. Both libraries load one adapter file, in which B is not
zero, so that every gradient is there.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import minilora
from minilora import QuantConfig
from minilora.measure.worker import anonymous_bytes, peak_anonymous_bytes, reset_peak
from minilora.quant.lookup import release_scratch

R, ALPHA = 16, 24
SIDES = ("ours", "peer", "frozen", "packed")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


class Cell(NamedTuple):
    """E experts, k of them for each token, width H; an expert is I wide, as in real models: few wide ones, or many narrow ones."""

    experts: int
    choices: int
    hidden: int
    tokens: int

    @property
    def inner(self) -> int:
        """I: 2H with few experts (Mixtral has 3.5 H), H/2 with many (OLMoE and Qwen3-30B-A3B have 0.5 H and 0.375 H)."""
        return 2 * self.hidden if self.experts <= 8 else self.hidden // 2


class Alone(nn.Module):
    """An experts module, called as a mixture calls it."""

    def __init__(self, cell: Cell) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        super().__init__()
        sizes = {"hidden_size": cell.hidden, "moe_intermediate_size": cell.inner, "num_experts": cell.experts}
        config = Qwen3MoeConfig(**sizes, num_experts_per_tok=cell.choices)
        config._experts_implementation = "grouped_mm"  # what a whole model sets by default
        self.experts = Qwen3MoeExperts(config)
        draw = torch.Generator().manual_seed(0)
        for weight in self.experts.parameters():
            weight.data.normal_(std=weight.shape[-1] ** -0.5, generator=draw)
        self.requires_grad_(False)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def layer_of(side: str, cell: Cell, folder: str) -> nn.Module:
    """The layer of a side, with the adapter in ``folder`` on it (``frozen`` has none)."""
    layer = Alone(cell)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if side == "peer":
            import peft

            return peft.PeftModel.from_pretrained(layer, folder, is_trainable=True).train()
        if side == "packed":
            minilora.quantize_model(layer, QuantConfig("nf4", double_quant=True))
        if side in ("ours", "packed"):
            return minilora.PeftModel.from_pretrained(layer, folder, is_trainable=True).train()
    return layer.train()


def write_adapter(cell: Cell, folder: str) -> None:
    """An adapter for this cell, as PEFT writes it."""
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=[], target_parameters=TARGETS)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Alone(cell), config)
        draw = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02, generator=draw)
        model.save_pretrained(folder)


class Step:
    """``step()`` is forward and backward of one batch: the gradients of the tokens, of the router's weights and of the adapter."""

    def __init__(self, side: str, cell: Cell, folder: str) -> None:
        self.layer = layer_of(side, cell, folder)
        draw = torch.Generator().manual_seed(2)
        self.x = torch.randn(cell.tokens, cell.hidden, generator=draw).requires_grad_()
        chosen, self.index = torch.randn(cell.tokens, cell.experts, generator=draw).softmax(-1).topk(cell.choices)
        self.weights = (chosen / chosen.sum(-1, keepdim=True)).requires_grad_()
        self.cotangent = torch.randn(cell.tokens, cell.hidden, generator=draw)

    def step(self) -> Tensor:
        out: Tensor = self.layer(self.x, self.index, self.weights)
        out.backward(self.cotangent)
        self.trained = [self.x, self.weights, *(p for p in self.layer.parameters() if p.requires_grad)]
        self.gradients = [part.grad for part in self.trained]
        for part in self.trained:
            part.grad = None
        return out.detach()

    def found(self) -> list[Tensor]:
        """The output, then all gradients."""
        return [self.step(), *(part for part in self.gradients if part is not None)]


def memory(settings: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """For a worker: what the layer itself holds, and what a step adds to this process at its peak, its buffers included; in bytes."""
    torch.set_num_threads(1)
    side = settings["side"]

    def answer(request: Any) -> dict[str, Any]:
        cell = Cell(*request)
        with tempfile.TemporaryDirectory(prefix="minilora-bench-") as folder:
            write_adapter(cell, folder)
            step = Step(side, cell, folder)
        layer = sum(tensor.nbytes for tensor in (*step.layer.parameters(), *step.layer.buffers()))
        step.step()
        step.gradients = step.trained = []
        release_scratch()
        held = anonymous_bytes()
        reset_peak()
        step.step()
        return {"layer": layer, "step": peak_anonymous_bytes() - held}

    return answer

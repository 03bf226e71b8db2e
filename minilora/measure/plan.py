"""The memory of a training step: predicted without allocating it, and measured beside.

One function, ``training_step``, is run twice: on paper, where a ledger counts every storage (``predict``), and for real in a fresh process
(``measure``). Nothing is fitted to any model: the bytes are those that the step's own operations make and free. The parts are those
held at the moment when most is held, so they add up to the peak.

What loading holds at most stands beside it: a model that is packed comes weight by weight, so it is the packed model and one dense weight.
Not in it: the Python process and its libraries. Attention and matrix libraries keep some MB for themselves, which no operator tells.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from minilora.errors import StateError
from minilora.linear import ops
from minilora.linear.experts.hook import compute_with_ours, put_layer
from minilora.linear.experts.known import has_projections
from minilora.linear.experts.layers import ExpertsLinear, QuantExperts
from minilora.linear.layers import QuantLinear, dense_shape
from minilora.lora.bare import Bare
from minilora.lora.change import Change
from minilora.lora.match import ALL_LINEAR
from minilora.measure.ledger import Ledger, on_paper
from minilora.measure.meter import Meter
from minilora.qlora.quantize_model import quantizable_paths
from minilora.quant.blockwise import quantize
from minilora.quant.config import QuantConfig
from minilora.quant.lookup import release_scratch
from minilora.quant.stack import empty_stack
from minilora.quant.weight import CHUNK
from minilora.report.tables import Row

__all__ = ["Memory", "as_rows", "measure", "pack_on_paper", "predict", "training_step", "while_packed"]

HELD = ("weights", "adapters", "optimizer")  # before the step
KEPT = "kept by libraries"  # buffers that outlive a step, holes between small blocks: measured only
STEP = ("activations", "logits and loss", "gradients", "temporaries")  # during it
LossOf = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step.

    Attributes:
        routed: predicted: whether it rests on the assumption that every expert of a mixture gets as many tokens as any other.
        parts: predicted: by ``HELD`` and ``STEP``; measured: by ``HELD``, ``KEPT`` and "the step", as can be told apart from outside.
        phase: of the peak ("forward", "loss", "backward" or "update"); empty when measured.
        loading: predicted: the most that is held while the model is read and packed, 0 where nothing is packed. Never measured here, where
            the pages of the file that is read would count; ``benchmarks/loading.py`` watches a load without them.
    """

    parts: Mapping[str, int]
    phase: str = ""
    loading: int = 0
    routed: bool = False

    @property
    def peak(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def step(self) -> int:
        """What the step adds to what was held before it."""
        return self.peak - sum(self.parts.get(name, 0) for name in (*HELD, KEPT))


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: LossOf,
    enter: Callable[[str], None] = lambda phase: None,
) -> Tensor:
    """Forward, backward, clip, update: what ``train`` does in a step, naming each phase to ``enter`` as it begins; returns the loss."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    enter("forward")
    loss = loss_of(model)
    enter("backward")
    loss.backward()
    enter("update")
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    enter("after")
    optimizer.zero_grad()
    return loss.detach()


def predict(model: nn.Module, loss_of: LossOf) -> Memory:
    """The peak of a step with AdamW on a CPU, once the optimizer has its moments.

    Args:
        model: with adapters, or with whatever else trains; on any device, the meta device too. It is not changed.
        loss_of: the scalar loss of a batch, given the model; a batch of real tensors, since it is small.

    Raises:
        StateError: the model looks at the values of its activations, which are not there on paper. (A mixture of experts does, in its
            router; there every expert is taken to get as many tokens as any other.)
    """
    paper = on_paper(model).train()
    with Change() as change:
        compute_with_ours(change, paper)
    trained = [parameter for parameter in paper.parameters() if parameter.requires_grad]
    optimizer = _warm_optimizer(trained)
    ledger = Ledger({torch.ops.minilora.quant_matmul.default: _product_workspace})
    ledger.hold([*paper.parameters(), *paper.buffers()], "weights")
    ledger.hold(trained, "adapters")
    ledger.hold([value for state in optimizer.state.values() for value in state.values()], "optimizer")
    paper.register_forward_hook(functools.partial(_mark_logits, ledger))

    def enter(phase: str) -> None:
        if phase == "backward":
            _name(ledger, {"forward": "activations", "loss": "logits and loss"})
        elif phase == "update":
            ledger.hold([parameter.grad for parameter in trained if parameter.grad is not None], "gradients")
        ledger.phase = phase

    release_scratch()  # buffers that are kept from call to call belong to a step's memory, whoever made them first
    mode: Any = getattr(next(paper.parameters(), None), "fake_mode", None)
    token = ops.paper.set(None if mode is None else ops.Paper(mode, lambda made: ledger.hold([made], "buffers")))
    try:
        with _in_a_line(model), ledger:
            training_step(paper, optimizer, loss_of, enter)
    finally:
        ops.paper.reset(token)
    release_scratch()
    phase, parts = ledger.peak()
    parts["temporaries"] = parts.pop("", 0) + parts.pop("buffers", 0)
    routed = any(has_projections(module) for module in paper.modules())
    return Memory({name: parts.get(name, 0) for name in HELD + STEP}, phase, routed=routed)


@contextmanager
def _in_a_line(model: nn.Module) -> Iterator[None]:
    """Where fake tensors do not do, torch logs a page; say it in a line instead."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StateError(
            f"{type(model).__name__}: its step cannot be run without memory, or not at all ({reason})"
        ) from error
    finally:
        log.setLevel(level)


def _warm_optimizer(trained: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with its two moments there already, as in every step but the first."""
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _mark_logits(ledger: Ledger, module: nn.Module, inputs: Any, output: Any) -> None:
    if torch.is_grad_enabled():  # not where the model is only asked about (``training/head.py``)
        ledger.hold([leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)], "logits and loss")
        ledger.phase = "loss"


def _name(ledger: Ledger, names: Mapping[str, str]) -> None:
    """What was made in a phase, and is still there, was kept for the backward pass."""
    for held in ledger.alive():
        if not held.kind and held.phase in names:
            held.kind = names[held.phase]


def _product_workspace(args: Sequence[Any], out: Tensor) -> int:
    """What the quantized product takes inside: decoded rows, their bytes as indices, the scales, and copies in the dtype it computes in."""
    x, packed, absmax, nested = args[:4]
    weights = x.shape[1] * out.shape[1]
    decoded = min(ops._ROWS, weights)
    # Of GGUF's blocks a piece at a time: their integers and what those are made of. Else the bytes as indices.
    made = 3 * min(decoded, CHUNK) if absmax is None else 4 * packed.numel() * decoded // weights
    inside = 4 * decoded + made
    if nested is not None:
        inside += 3 * 4 * absmax.numel()
    if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not ops.cpu_has_bf16()):
        inside += 4 * x.shape[0] * (x.shape[1] + out.shape[1])
    return inside


def pack_on_paper(model: nn.Module, config: QuantConfig) -> nn.Module:
    """Replace the linear layers (all but the head) of a model on the meta device by packed ones without memory; in place."""

    @functools.cache
    def packed(shape: tuple[int, int], dtype: torch.dtype) -> Any:
        return quantize(torch.zeros(shape, dtype=dtype), config)

    bare = Bare(model)
    with Change() as change:
        for path in quantizable_paths(model, ALL_LINEAR):
            base: Any = bare.get_submodule(path)
            owner, _, name = path.rpartition(".")
            if isinstance(base, ExpertsLinear):
                stack = empty_stack(dense_shape(base), config, base.weight.dtype)  # type: ignore[arg-type]
                layer: nn.Module = QuantExperts.in_place_of(base, stack)
            else:
                layer = QuantLinear(packed(dense_shape(base), base.weight.dtype), base.bias).to("meta")
            put_layer(change, bare.get_submodule(owner), name, layer.train(base.training))
    return model


def while_packed(frozen: nn.Module, dense: Sequence[Tensor]) -> int:
    """Bytes that loading holds at most: the packed model, and the largest of the ``dense`` weights that are packed one by one."""
    held = sum(tensor.numel() * tensor.element_size() for tensor in frozen.parameters())
    return held + max((tensor.numel() * tensor.element_size() for tensor in dense), default=0)


def measure(
    load: Callable[[], nn.Module],
    adapt: Callable[[nn.Module], nn.Module],
    loss_of: LossOf,
    device: torch.device | str = "cpu",
) -> Memory:
    """Do two real steps and read the peak of the second; for a process of its own (``worker``).

    Args:
        load: makes the frozen model; all that it imports should have been imported. adapt: puts the adapters in.
        loss_of: as in ``predict``. device: where ``load`` puts the model.

    Raises:
        StateError: this system does not tell a process its peak memory.
    """
    meter = Meter(device)
    meter.reset()
    training_step(tiny := nn.Linear(2, 2), torch.optim.AdamW(tiny.parameters()), lambda m: m(torch.ones(1, 2)).sum())
    start = meter.held()
    model = load()
    own_memory(model)
    marks = [meter.held()]
    model = adapt(model).train()
    marks.append(meter.held())
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    training_step(model, optimizer, loss_of)
    marks.append(meter.held())
    meter.reset()
    training_step(model, optimizer, loss_of)
    marks.append(meter.peak())
    weights, adapters, held, step = (after - before for before, after in zip([start, *marks], marks, strict=False))
    moments = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    sizes = (weights, adapters, moments, held - moments, step)
    return Memory(dict(zip((*HELD, KEPT, "the step"), sizes, strict=True)))


@torch.no_grad()
def own_memory(model: nn.Module) -> None:
    """Copy weights that may lie in a mapped file, so that they count as this process's memory."""
    for tensor in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        tensor.data = tensor.data.clone()


def as_rows(predicted: Memory, measured: Memory | None = None) -> tuple[list[str], list[Row]]:
    """``(columns, rows)`` of the table: what is held, what the step adds (its parts are known to the prediction only), and the peak."""
    columns = ["predicted"] + ["measured"] * (measured is not None)

    def row(name: str, guess: int | None, found: int | None = None) -> Row:
        values = [guess, found] if measured else [guess]
        return Row(name, [_size(value) for value in values], values, "At the peak of a step")

    held = [row(name, predicted.parts[name], measured.parts[name] if measured else None) for name in HELD]
    held += [row(KEPT, None, measured.parts[KEPT])] if measured else []
    step = row("the step", predicted.step, measured.step if measured else None)
    parts = [row(f"  {name}", predicted.parts[name]) for name in STEP]
    peak = row("peak", predicted.peak, measured.peak if measured else None)
    loading = [row("while loading", predicted.loading)]
    return columns, [*held, step, *parts, peak, *(loading if predicted.loading else [])]


def _size(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:,.1f} MB"

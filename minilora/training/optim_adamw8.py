"""AdamW whose two moments take one byte a number each: 2.03 bytes a parameter instead of 8 (Dettmers et al. 2022, arXiv 2110.02861).

AdamW keeps two running means of every number it trains, of the gradient and of its square: 8 bytes in fp32, as much as the number and
its gradient together. Neither has to be exact. The weights are: the moments are decoded, the step is computed in fp32, and the moments
are encoded again. The code is NF4's idea once more (``quant/codebooks.py``), with three answers to what is different here::

    absmax_b = max_i |m_bi|                             a scale for each block of 256 numbers, so one outlier spoils 255 others at most
    code_bi  = argmin_j |level_j - m_bi / absmax_b|     the nearest of 256 levels (section 2.1, equation 4)
    m_bi    ~= level_code_bi * absmax_b

- Weights of a layer are normal, and NF4's levels are quantiles. Moments of one block span many decades, so their levels do too: seven of
  them, the finer the larger (``dynamic_map``, which double quantization holds its scales in).
- The first moment has a sign. The second has none, and its root divides: the bit of the sign goes into finer levels (section 2.2).
- The error of a weight that is packed once stays as it is. That of a moment is made in every step, and forgotten as the mean moves on.

What it costs: the smallest level of a second moment is 3e-7 of its block's largest. Where a gradient stays 2,500 times below the largest
of its block, the mean of its squares is taken for zero and its mean is not. Then only the square of this step divides: the step is up to
30 times too large, and far more in a batch that says nothing of this number. Within one row of a factor numbers are rarely that far apart.
Where a loss jumps, a larger ``min_8bit_size`` tells whether this is why.

QLoRA (Dettmers et al. 2023) takes this state and pages it: beside NF4 and double quantization its third part is *paged* optimizers, whose
state the driver moves to the computer's memory when the GPU's is full. That is the driver's work and bitsandbytes' code
(``training/optim_bnb.py``). Next file: ``training/optim_bnb.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minilora.errors import ConfigError, StateError
from minilora.files import validate
from minilora.quant.codebooks import dynamic_map
from minilora.quant.constants import constant
from minilora.training.optim_closure import loss_again

__all__ = ["AdamW8bit"]

BLOCK = 256  # numbers of a scale
_CHUNK = 1 << 20  # numbers that are in fp32 at a time; a multiple of BLOCK
_REST = (
    15  # bits of a number in fp32 that tell it only from numbers beside it: there is one threshold at most among those
)
_MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # whether it has a sign


class AdamW8bit(Optimizer):
    """AdamW with its state in 8 bits, bit-equal to the torch reference of bitsandbytes' ``adamw`` in blocks of 256.

    State of a parameter: ``step`` (fp32, one number), and for both moments codes (uint8, of the parameter's shape) and ``_absmax`` (fp32,
    one for 256 codes): 2 + 8/256 = 2.03 bytes a number. A parameter of less than ``min_8bit_size`` numbers has its moments in fp32: they
    are few, and a block of them may be all there is of a bias.

    Args:
        params: parameters, or groups of them. lr, betas, eps, weight_decay: as in AdamW; the decay is decoupled and comes first.
        min_8bit_size: numbers that a parameter has at least for its state to be in 8 bits; 4096 as in bitsandbytes.

    Raises:
        ConfigError: a number outside of its range. StateError (in a step): a gradient that is sparse or complex.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            validate.number(name, value, 0, math.inf)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas={betas!r}: wanted two numbers in [0, 1)")
        validate.whole("min_8bit_size", min_8bit_size, 0)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "min_8bit_size": min_8bit_size}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. ``closure`` computes the loss again, which is returned."""
        loss = loss_again(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if grad.is_sparse or grad.is_complex():
            raise StateError(
                "AdamW8bit got a gradient that is sparse or complex; wanted a dense real one, or use AdamW"
            )
        state = self.state[parameter]
        if not state:
            forms = self.state_form(parameter)
            state.update(
                {key: torch.zeros(shape, dtype=kind, device=parameter.device) for key, (shape, kind) in forms.items()}
            )
            state["step"] = state["step"].cpu()  # it is read in every step, and a GPU would have to be waited for
        state["step"] += 1
        weights, grads = parameter.contiguous().view(-1), grad.reshape(-1)
        for start in range(0, len(weights), _CHUNK):
            part = slice(start, start + _CHUNK)
            mean, square = (_read(state, moment, part) for moment in _MOMENTS)
            _adamw(weights[part], grads[part].float(), mean, square, int(state["step"]), group)
            for moment, values in zip(_MOMENTS, (mean, square), strict=True):
                _write(state, moment, part, values)
        if weights.data_ptr() != parameter.data_ptr():  # it did not lie in one piece
            parameter.copy_(weights.view_as(parameter))

    def state_form(self, parameter: Tensor) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of all that the state of a parameter holds, by name."""
        group = next(group for group in self.param_groups if any(one is parameter for one in group["params"]))
        form: dict[str, tuple[torch.Size, torch.dtype]] = {"step": (torch.Size(), torch.float32)}
        for moment in _MOMENTS:
            if parameter.numel() < group["min_8bit_size"]:
                form[moment] = parameter.shape, torch.float32
            else:
                form[moment] = parameter.shape, torch.uint8
                form[f"{moment}_absmax"] = torch.Size([-(-parameter.numel() // BLOCK)]), torch.float32
        return form

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of another one of the same parameters, to the bit.

        Raises:
            StateError: it is not of this optimizer with these parameters; nothing has changed then. ValueError: other groups.
        """
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        theirs = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
        held = [
            (one, state_dict["state"][key])
            for one, key in zip(own, theirs, strict=False)
            if state_dict["state"].get(key)
        ]
        sizes = [group.get("min_8bit_size") for group in state_dict["param_groups"]]
        if sizes != [group["min_8bit_size"] for group in self.param_groups]:
            raise StateError(
                f"the state is of another optimizer: min_8bit_size is {sizes} in it; make an AdamW8bit with the same"
            )
        for parameter, state in held:
            found = {key: (value.shape, value.dtype) for key, value in state.items() if isinstance(value, Tensor)}
            if found != self.state_form(parameter):
                raise StateError(
                    f"the state of a parameter of shape {list(parameter.shape)} holds {sorted(found)}; wanted that of an AdamW8bit of "
                    "the same parameters"
                )
        super().load_state_dict(state_dict)
        for parameter, state in held:  # torch has cast codes and scales to the parameter's dtype
            devices = {key: "cpu" if key == "step" else parameter.device for key in state}
            self.state[parameter] = {key: value.to(devices[key], copy=True) for key, value in state.items()}


def _adamw(weights: Tensor, grads: Tensor, mean: Tensor, square: Tensor, step: int, group: dict[str, Any]) -> None:
    """One step in fp32, in place, in the order of operations of bitsandbytes' reference."""
    (first, second), lr = group["betas"], group["lr"]
    mean.mul_(first).add_(grads, alpha=1.0 - first)
    square.mul_(second).addcmul_(grads, grads, value=1.0 - second)
    below = (square.sqrt() / math.sqrt(1.0 - second**step)).add_(group["eps"])
    exact = weights.float()  # the weights themselves, where they are fp32
    if group["weight_decay"]:
        exact.mul_(1.0 - lr * group["weight_decay"])
    exact.addcdiv_(mean, below, value=-lr / (1.0 - first**step))
    weights.copy_(exact)


# ---- the code


def _read(state: dict[str, Tensor], moment: str, part: slice) -> Tensor:
    """A part of a moment in fp32: what is stored where that is fp32, and the decoded values otherwise."""
    kept = state[moment].view(-1)[part]
    if kept.dtype == torch.float32:
        return kept
    levels = _tables(_MOMENTS[moment], kept.device)[0]
    return _blocks(levels.index_select(0, kept.int())).mul_(_scales(state, moment, part)).view(-1)[: len(kept)]


def _write(state: dict[str, Tensor], moment: str, part: slice, values: Tensor) -> None:
    kept = state[moment].view(-1)[part]
    if kept.dtype == torch.float32:
        return  # ``values`` are the state itself
    blocks = _blocks(values)
    absmax = blocks.abs().amax(1, keepdim=True)
    absmax[absmax == 0] = 1.0
    kept.copy_(_nearest(blocks.div_(absmax).view(-1), _MOMENTS[moment])[: len(kept)])
    _scales(state, moment, part).copy_(absmax)


def _blocks(values: Tensor) -> Tensor:
    """fp32 ``[blocks, 256]``, the last one filled up with zeros."""
    return nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)


def _scales(state: dict[str, Tensor], moment: str, part: slice) -> Tensor:
    return state[f"{moment}_absmax"][part.start // BLOCK : -(-part.stop // BLOCK)].unsqueeze(1)


def _nearest(values: Tensor, signed: bool) -> Tensor:
    """The code of the nearest level of each value, int32; of two that are as near, the lower one.

    What ``torch.bucketize(values, _thresholds(signed))`` finds, in a tenth of its time on a CPU: the first bits of a number leave one
    threshold at most to compare it with.
    """
    _, thresholds, first = _tables(signed, values.device)
    codes = first.index_select(0, (values.view(torch.int32) >> _REST).bitwise_and_(len(first) - 1))
    return codes.add_(values > thresholds.index_select(0, codes))


@functools.lru_cache(maxsize=32)
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """On a device: the levels; the thresholds between them, and infinity after the last level; ``_first_codes``."""
    thresholds = nn.functional.pad(_thresholds(signed), (0, 1), value=math.inf)
    return dynamic_map(signed).to(device), thresholds.to(device), _first_codes(signed).to(device)


@constant
def _first_codes(signed: bool) -> Tensor:
    """int32 ``[2**17]``: of all numbers in fp32 that begin with the same 17 bits, the code of the smallest one."""
    begin = torch.arange(1 << (32 - _REST), dtype=torch.int64) << _REST
    ends = torch.stack([begin, begin | ((1 << _REST) - 1)])
    values = torch.where(ends < 1 << 31, ends, ends - (1 << 32)).to(torch.int32).view(torch.float32)
    return torch.bucketize(values.amin(0), _thresholds(signed), out_int32=True)


@constant
def _thresholds(signed: bool) -> Tensor:
    """fp32 ``[255]``: the largest number for which each level is nearer than the next one, both distances being rounded to fp32.

    It is the middle between them or a few numbers beside it, as the middle is rounded too.
    """
    levels = dynamic_map(signed)
    low, high = levels[:-1], levels[1:]
    found = (low + high) / 2
    for _ in range(4):
        found = torch.nextafter(found, low)
    for _ in range(8):
        above = torch.nextafter(found, high)
        found = torch.where(above - low <= high - above, above, found)
    return found

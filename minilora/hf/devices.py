"""Where a model goes, and in which dtype: what ``--device``, ``--dtype`` and ``--attention`` mean on this machine.

``auto`` takes a CUDA GPU where one works, and says which; where it takes the CPU it says why. A device that is not there is refused
before anything is read. Under torchrun each process takes the GPU of its own number. Next file: ``hf/load.py``.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from minilora.errors import ConfigError, MissingPackageError
from minilora.files.validate import shown
from minilora.hf.folders import import_transformers
from minilora.hf.places import ATTENTION, AUTO, check_place

__all__ = ["Place", "choose", "settled"]

Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Place:
    """Where a model goes.

    Attributes:
        device: a CPU, one GPU. dtype: of the weights that are not packed. said: both in words, and why it is the CPU where it is.
    """

    device: torch.device
    dtype: torch.dtype
    said: str

    @property
    def names(self) -> dict[str, str]:
        """``device`` and ``dtype`` as a job says them."""
        return {"device": str(self.device), "dtype": str(self.dtype).removeprefix("torch.")}


def choose(device: str = AUTO, dtype: str = AUTO, attention: str = AUTO) -> Place:
    """The place that these words mean on this machine.

    Args:
        device: auto, cpu, cuda, cuda:N or mps. dtype: auto, float32, bfloat16 or float16.
        attention: auto, or a name that transformers has; only looked at, so that a wrong one shows before a model is read.

    Raises:
        ConfigError: a word that means nothing, or a device that is not there or does not work.
        MissingPackageError: the attention needs a package that is not installed.
    """
    check_place(device, dtype, attention)
    _check_attention(attention)
    place, why = _automatic() if device == AUTO else (_named(device), "")
    kind = _usual_dtype(place) if dtype == AUTO else getattr(torch, dtype)
    words = f"{_called(place)} in {str(kind).removeprefix('torch.')}"
    return Place(place, kind, words + (f" ({why})" if why else ""))


def settled(job: Asked, place: Place) -> Asked:
    """A job with the device and dtype that were chosen in the place of "auto"."""
    return dataclasses.replace(job, **place.names)  # type: ignore[type-var]


def _automatic() -> tuple[torch.device, str]:
    """The device that "auto" takes, and why it is the CPU where it is."""
    cpu = torch.device("cpu")
    if torch.cuda.is_available():
        place = _cuda(AUTO, "")
        broken = _broken(place)
        return (cpu, f"{_called(place)} does not work: {broken}") if broken else (place, "")
    if torch.backends.mps.is_available():
        return cpu, "minilora has not been run on this machine's Apple GPU; --device mps takes it"
    return cpu, _why_no_cuda()


def _named(device: str) -> torch.device:
    """The device of that name. Raises ``ConfigError`` if it is not there or does not work."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "mps" or number:
        _refuse_shared(device)
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("device='mps': there is no Apple GPU that torch can use; wanted auto or cpu")
        place = torch.device("mps")
    elif torch.cuda.is_available():
        place = _cuda(device, number)
    else:
        raise ConfigError(f"device={device!r}: {_why_no_cuda()}; wanted auto or cpu")
    if broken := _broken(place):
        raise ConfigError(f"device={device!r}: {_called(place)} does not work: {broken}; wanted auto or cpu")
    return place


def _refuse_shared(device: str) -> None:
    """Raise ``ConfigError`` for one device that several processes of this machine would take."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if said.isdecimal() and int(said) > 1:
        raise ConfigError(
            f"device={device!r}: torchrun has started {said} processes on this machine, which cannot share it; wanted cuda, by which each "
            "takes a GPU of its own, or cpu"
        )


def _cuda(device: str, number: str) -> torch.device:
    """The GPU of that number, or of this process. Raises ``ConfigError`` if there are not so many."""
    index, count = int(number) if number else _rank(), torch.cuda.device_count()
    if index < count:
        return torch.device("cuda", index)
    known = "cuda:0 alone" if count == 1 else f"cuda:0 to cuda:{count - 1}"
    own = "" if number else f", and process {index} wants one of its own"
    raise ConfigError(f"device={device!r}: this machine has {known}{own}; wanted one that is there, or cpu")


def _rank() -> int:
    """Which of the processes of this machine this one is; torchrun says it."""
    said = os.environ.get("LOCAL_RANK", "0")
    return int(said) if said.isdecimal() else 0


def _broken(place: torch.device) -> str:
    """Why nothing can be computed there, or "": a GPU may be seen and yet be too old for this torch, or taken by another program."""
    try:
        return "" if (torch.zeros(1, device=place) + 1).item() == 1.0 else "it computes 0 + 1 wrongly"
    except Exception as error:  # of a driver anything can come
        return _line(error)


def _why_no_cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA"
    try:
        torch.cuda.init()
    except Exception as error:
        return _line(error)
    return "torch finds no GPU"


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _called(place: torch.device) -> str:
    if place.type == "cpu":
        return "the CPU"
    return f"{place} ({torch.cuda.get_device_name(place)})" if place.type == "cuda" else str(place)


def _usual_dtype(place: torch.device) -> torch.dtype:
    """bf16 on a GPU that multiplies it, else fp32: fp16 would want a scaled loss."""
    if place.type != "cuda":
        return torch.float32
    with torch.cuda.device(place):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def _check_attention(name: str) -> None:
    """Raise for an attention that transformers has not, or whose package is not there: left to it, it would ask a hub for a kernel."""
    if name == AUTO:
        return
    import_transformers()
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils import import_utils

    known = [*ATTENTION, *(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in key)]
    if name not in known:
        raise ConfigError(f"attention={shown(name)}: wanted one of {', '.join(dict.fromkeys(known))}")
    if name.startswith("flash_attention_"):
        there: Any = getattr(import_utils, f"is_flash_attn_{name[-1]}_available", lambda: False)
        if not there():
            raise MissingPackageError(
                f"attention={name!r}: its package is not installed, or finds no GPU; install it, or give sdpa, eager or auto"
            )

"""How the processes that were started together find each other in a store where earlier ones have left their words.

torchrun keeps one store when it starts all processes again, so what is read there may be of the last attempt: an address where nobody
listens any more, or why that attempt failed. So each process says a word of its own that was drawn just now. The first one answers to
every such word with its own, which only this attempt can know, and all that follows stands under it. Next file:
``training/lifeline.py``.
"""

from __future__ import annotations

import os
import secrets
import time
from datetime import timedelta
from typing import Any

import torch

from minilora.errors import ConfigError, TrainingError

__all__ = ["make_group", "meet", "meeting_point"]

_PAUSE = 0.02  # seconds between two looks
_WAY = "give torchrun an address that all machines reach, and GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME) the network that it is in"


def meeting_point(rank: int, size: int, longest: timedelta) -> Any:
    """The store that torchrun tells all processes. Raises ``ConfigError`` where this one does not reach it."""
    try:
        return next(iter(torch.distributed.rendezvous("env://", timeout=longest)))[0]
    except RuntimeError as error:
        point = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(f"process {rank} of {size} cannot reach {point} ({_brief(error)}); {_WAY}") from None


def meet(store: Any, rank: int, size: int, longest: float) -> str:
    """The word of this attempt, the same in all its processes and no other.

    Args:
        store: of torch, the same for all; every attempt may use it. longest: seconds to wait.

    Raises:
        TrainingError: not all have come by then, with their ranks.
    """
    own, until = secrets.token_hex(8), time.monotonic() + longest
    if rank:
        store.set(f"hello/{rank}", own)
        while not store.check([f"welcome/{own}"]):
            _pause(until, "process 0 has")
        word = store.get(f"welcome/{own}").decode()
        store.set(f"here/{word}/{rank}", "")
        return word
    others: dict[int, bytes] = dict.fromkeys(range(1, size), b"")  # what was answered last
    while missing := [other for other in others if not store.check([f"here/{own}/{other}"])]:
        for other in missing:
            if store.check([f"hello/{other}"]) and (said := store.get(f"hello/{other}")) != others[other]:
                store.set(f"welcome/{said.decode()}", own)
                others[other] = said
        _pause(until, f"process {', '.join(map(str, missing))} of {size} has")
    return own


def _pause(until: float, who: str) -> None:
    if time.monotonic() > until:
        raise TrainingError(
            f"{who} not come; start all processes with the same number of machines and processes, and one meeting point"
        )
    time.sleep(_PAUSE)


def make_group(store: Any, rank: int, size: int, longest: timedelta) -> None:
    """What tensors go over. Raises ``ConfigError`` where the processes do not reach each other."""
    tensors, backend = torch.distributed.PrefixStore("tensors", store), "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
    try:
        torch.distributed.init_process_group(backend, store=tensors, rank=rank, world_size=size, timeout=longest)
    except RuntimeError as error:
        raise ConfigError(f"the processes cannot exchange tensors ({_brief(error)}); {_WAY}") from None


def _brief(error: RuntimeError) -> str:
    return " ".join(str(error).split())[:200]

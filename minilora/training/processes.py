"""The processes of a run, as torchrun starts them: which one this is, sums in one fixed order, and what all agree on.

A run of one process is the same code with ``size`` 1, and imports nothing of torch.distributed. Tensors go over its collectives (gloo
between CPUs, NCCL between GPUs), words over the store of the rendezvous. Next file: ``training/step.py``.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from minilora.errors import ConfigError, MiniLoraError, MissingPackageError
from minilora.training.lifeline import Elsewhere, Lifeline
from minilora.training.meeting import make_group, meet, meeting_point
from minilora.training.memory import is_out_of_memory

__all__ = ["ALONE", "Processes", "joined", "own_gpu"]

_LONGEST = timedelta(minutes=10)  # of one exchange between processes that are all alive
_LEAVING = 5.0  # seconds
_current: Processes | None = None
_times = 0  # runs that this process took part in: each has its own words


class Processes:
    """The processes of one run; made by ``joined``. ``rank``: which one this is, from 0; ``size``: how many there are; ``local``:
    which one it is on its machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0, store: Any = None) -> None:
        self.rank, self.size, self.local = rank, size, local
        self._store, self._round = store, 0
        self.owns_group = False
        self.line = Lifeline(store, rank, size, local) if size > 1 else None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def launched(self) -> bool:
        """Whether torchrun started this process: it passes signals on, which a terminal may have sent to the process already."""
        return self.size > 1 or "TORCHELASTIC_RUN_ID" in os.environ

    def part(self, count: int) -> range:
        """Which of ``count`` pieces of work are this process's: neighbours."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def is_exact(self, count: int) -> bool:
        """Whether a sum over ``count`` pieces is one tree whatever the number of processes: each one's part is a branch of it."""
        return self.size & (self.size - 1) == 0 and count % self.size == 0

    def name(self, rank: int) -> str:
        """As messages call a process; "" where there is only one."""
        return f"process {rank} of {self.size}" if self.size > 1 else ""

    def prepare(self, signalled: Callable[[], bool], last_words: Callable[[], object]) -> None:
        """Say how to see that a signal has come, and what to do before this process is given up (``Lifeline``)."""
        if self.line is not None:
            self.line.hurried, self.line.last_words = signalled, last_words

    # ---- words

    def share(self, value: Any) -> list[Any]:
        """What each process says, by rank: JSON values. Waits for all; one that has failed or died ends the wait."""
        if self.size == 1:
            return [value]
        self._round += 1
        place, said = f"words/{self._round}", json.dumps(value).encode()
        if not self.first:
            self._store.set(f"{place}/{self.rank}", said)
            self._wait([f"{place}/all"])
            return json.loads(self._store.get(f"{place}/all"))
        keys = [f"{place}/{rank}" for rank in range(1, self.size)]
        self._wait(keys)
        every = [said, *self._store.multi_get(keys)]
        self._store.set(f"{place}/all", b"[" + b",".join(every) + b"]")
        for key in (*keys, f"words/{self._round - 1}/all"):  # who has spoken again has read the last one
            self._store.delete_key(key)
        return [json.loads(one) for one in every]

    def _wait(self, keys: list[str]) -> None:
        pause = 0.0005
        while not self._store.check(keys):
            news = self.line.news if self.line else None
            if news is not None and not self._store.check(keys):  # looked at again: who failed may have spoken before
                raise Elsewhere(news)
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    def agree(self, known: Mapping[str, Any]) -> None:
        """Raise ``ConfigError`` on all where one process has another value than the first, by its name."""
        every = self.share(dict(known))
        for rank, theirs in enumerate(every):
            if other := next((what for what, value in theirs.items() if value != every[0].get(what)), None):
                raise ConfigError(
                    f"{self.name(rank)} has another {other} than process 0; give all processes the same command, files and versions"
                )

    def attempt(self, work: Callable[[], Any], bound: bool = False) -> list[Any]:
        """What ``work()`` returns in each process, by rank: JSON values. No memory in one is ``MemoryError`` in all, with its name.

        ``bound``: the work waits for the other processes inside (for their shards). Then those that wait for one that has failed cannot
        hear of it here, and end by their lifeline.
        """
        if self.size == 1:
            return [work()]
        if bound:
            with self.exchange():
                return self.share(work())
        found, failed = None, None
        try:
            found = work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise  # the others hear of it when they speak next
            failed = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        every = self.share([failed, found])
        for rank, (said, _) in enumerate(every):
            if said:
                raise MemoryError(f"{said}, in {self.name(rank)}")
        return [value for _, value in every]

    # ---- tensors

    def add(self, tensors: Sequence[Tensor], exact: bool) -> None:
        """Put the sums over all processes into the tensors, which have the same shapes everywhere.

        ``exact``: by recursive doubling, so that the order is that of a tree over neighbours and all get the same bits; else all-reduce.
        """
        if self.size == 1:
            return
        for kind in sorted({(str(t.dtype), str(t.device)) for t in tensors}):
            own = [t for t in tensors if (str(t.dtype), str(t.device)) == kind]
            flat = torch.cat([t.reshape(-1) for t in own])
            with self.exchange():
                if exact:
                    self._double(flat)
                else:
                    torch.distributed.all_reduce(flat)
            for tensor, part in zip(own, flat.split([t.numel() for t in own]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def _double(self, flat: Tensor) -> None:
        dist, other, distance = torch.distributed, torch.empty_like(flat), 1
        while distance < self.size:
            partner = self.rank ^ distance
            both = [dist.P2POp(dist.isend, flat, partner), dist.P2POp(dist.irecv, other, partner)]
            for request in dist.batch_isend_irecv(both):
                request.wait()
            flat.add_(other)  # a sum of two has the same bits from either side
            distance *= 2

    def send(self, files: Mapping[str, bytearray], owner: int) -> dict[str, bytearray]:
        """The files of process ``owner``, given to all; what the others pass is not looked at."""
        if self.size == 1:
            return dict(files)
        found = {}
        for name, size in self.share({name: len(content) for name, content in files.items()})[owner].items():
            held = files[name] if self.rank == owner else bytearray(size)
            if size:
                with self.exchange():
                    torch.distributed.broadcast(torch.frombuffer(held, dtype=torch.uint8), owner)
            found[name] = held
        return found

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Around what all do together: where it breaks, the reason is that another one failed or died. Raises ``Elsewhere`` then."""
        try:
            yield
        except RuntimeError as error:
            if self.line is not None:
                self.line.refuse_broken(error)
            raise


ALONE = Processes()


def own_gpu(local: int) -> torch.device:
    """The GPU of the process with this number on its machine."""
    return torch.device("cuda", local)


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started, this one among them, until the end of the block; inside another such block the same ones.

    Where one raises, all do, within a minute: the reason of the first, with its name, or what all say alike. One that ends its block waits
    for the others.

    Raises:
        ConfigError: torchrun's environment makes no sense, or they cannot reach each other. MissingPackageError: this torch has no NCCL,
        and there is a GPU to work on.
    """
    global _current
    if _current is not None:
        yield _current
        return
    try:
        processes = _current = _join()
    except MiniLoraError as error:
        error.told = False  # it may be this one's alone
        raise
    try:
        if processes.owns_group:
            make_group(processes._store, processes.rank, processes.size, _LONGEST)
        yield processes
        processes.share("done")
    except Exception as error:
        raise (processes.line.reason(error) if processes.line else error) from error.__cause__
    finally:
        _current = None
        if processes.line is not None:
            processes.line.close()
            if processes.owns_group:
                leaving = threading.Thread(target=_leave_group, daemon=True)
                leaving.start()
                leaving.join(_LEAVING)


def _leave_group() -> None:
    """In a thread: where a partner is gone, its exchange may never be closed, and the reason must still be said."""
    with suppress(RuntimeError, AssertionError, ValueError):
        torch.distributed.destroy_process_group()


def _join() -> Processes:
    """This process among those of the environment; alone where it names none."""
    global _times
    rank, size, local = (_number(name, least) for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if size == 1:
        return ALONE
    if rank >= size or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise ConfigError(
            f"WORLD_SIZE={size} and RANK={os.environ.get('RANK', 'not set')}: wanted what torchrun sets; start by torchrun, or unset both"
        )
    import torch.distributed as dist

    if torch.cuda.is_available():
        if not dist.is_nccl_available():
            raise MissingPackageError(
                "this torch has no NCCL, over which processes with GPUs add their gradients; install torch for Linux with CUDA, or hide "
                "the GPUs (CUDA_VISIBLE_DEVICES=)"
            )
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {rank} of {size} is number {local} on its machine, which has {torch.cuda.device_count()} GPUs; give "
                f"torchrun --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(own_gpu(local))
    _times += 1
    owns_group = not dist.is_initialized()
    # A program of the user's own may have met already.
    met = None if owns_group else dist.distributed_c10d._get_default_store()
    meeting = met or meeting_point(rank, size, _LONGEST)
    place = dist.PrefixStore(f"minilora/{_times}", meeting)
    store = dist.PrefixStore(meet(place, rank, size, _LONGEST.total_seconds()), place)
    processes = Processes(rank, size, local, store)
    processes.owns_group = owns_group
    return processes


def _number(name: str, least: int) -> int:
    """A whole number that torchrun puts into the environment; ``least`` where it is not there."""
    said = os.environ.get(name, str(least))
    if not said.isdecimal() or int(said) < least:
        raise ConfigError(
            f"{name}={said!r} in the environment: wanted what torchrun sets; start by torchrun, or unset it"
        )
    return int(said)

"""A sweep in several processes: how many, each with an equal part of the threads, and their folders made one at the end.

    OUT/workers.json      which trials each worker has; a sweep that was shared out goes on shared out in the same way
    OUT/worker-1/ ...     what each has done, as ``lab/sweeps/folder.py`` has it

At the end all of it lies in ``OUT`` as one process would have left it, and the folders of the workers are gone.
Next file: ``lab/jobs/merging.py``.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from minilora import errors
from minilora.errors import CheckpointError, ConfigError, Interrupted, MiniLoraError, TrainingError
from minilora.files.write import write_file
from minilora.lab.jobs.foretold import foretell
from minilora.lab.jobs.job import Ready, run_here
from minilora.lab.jobs.merging import merge, partial_table, share_is_done, tidy
from minilora.lab.jobs.workers import Worker, shares_of
from minilora.lab.sweeps.left import WHERE_FILE, WORKERS_FILE, clear, read_json, read_state, worker_folder
from minilora.lab.sweeps.trial import Result
from minilora.training.lock import held
from minilora.training.signals import caught

__all__ = ["AUTO", "foretold", "run", "workers_for"]

AUTO = "auto"
_SMALL = 200_000_000  # bytes of a base of which a copy for each process costs less than the libraries in it (300 MB)
_PROCESSES = 8  # at most, that "auto" takes
_MOST = 64
_Say = Callable[[str], None]
_Watch = Callable[[str, dict[str, Any]], None]


def run(
    ready: Ready, workers: int | str, say: _Say, watch: _Watch | None = None, before: Callable[[], object] | None = None
) -> list[Result]:
    """Sweep in this process, or in several.

    Args:
        ready: from ``look``. workers: how many processes, or "auto". before: called by each worker first; a function that pickle knows.

    Returns:
        As ``sweep``; of a full fine-tuning in a worker the weights are not there.

    Raises:
        As ``sweep``. TrainingError, or what it raised: a worker ended before its work; what the others did is saved.
    """
    asked = ready.asked
    known = _recorded(asked.folder) if asked.job.resume else None
    count = known or workers_for(ready, workers, say)
    if known is None and asked.job.resume and (asked.folder / WHERE_FILE).exists() and count > 1:
        count = 1
        say(f"{asked.folder}: its state is that of one process, and it goes on in one")
    if known and known != workers:
        say(f"{asked.folder}: the sweep was shared out among {known} workers, and goes on so")
    if count == 1 and not known:
        return run_here(ready, say, watch)
    return _Shared(ready, shares_of(asked.trials, count), say, watch, before).run()


def foretold(ready: Ready, workers: int | str, say: _Say) -> None:
    """A dry run, in this process: as ``foretell``, with the shares and the threads that the workers would have."""
    count = workers_for(ready, workers, say)
    threads = max(1, (ready.asked.job.threads or torch.get_num_threads()) // count)
    foretell(ready, shares_of(ready.asked.trials, count), threads, say)


def workers_for(ready: Ready, workers: int | str, say: _Say) -> int:
    """How many processes are meant. Raises ``ConfigError`` for a number that makes no sense here."""
    threads, trials = ready.asked.job.threads or torch.get_num_threads(), len(ready.asked.trials)
    if workers != AUTO:
        if not isinstance(workers, int) or isinstance(workers, bool) or not 1 <= workers <= _MOST:
            raise ConfigError(f"workers={workers!r}: wanted a whole number from 1 to {_MOST}, or auto")
        if workers > trials:
            raise ConfigError(f"workers={workers}: the sweep has {trials} trials; wanted no more workers than trials")
        if workers > 1 and ready.place.device.type != "cpu":
            raise ConfigError(
                f"workers={workers}: they share out the threads of the CPU, and the model goes to {ready.place.device}; leave workers out"
            )
        return workers
    count, why = _chosen(ready, threads, trials)
    say(f"workers: {count}, because {why}")
    return count


def _chosen(ready: Ready, threads: int, trials: int) -> tuple[int, str]:
    """What "auto" takes, and why. Threads meet after every product, and all wait for the one whose core is busy; processes never meet.

    Half of the trials take 0.51 to 0.55 of the time of all (docs/guides/sweeps.md), which is about the best that two threads could do.
    """
    if ready.place.device.type != "cpu":
        return 1, f"the model goes to {ready.place.device}"
    if threads == 1 or trials == 1:
        return 1, f"there is one {'thread' if threads == 1 else 'trial'}"
    size = sum(parameter.numel() * parameter.element_size() for parameter in ready.prepared.paper.parameters())
    if size > _SMALL:
        return (
            1,
            f"a copy of the model for each worker would take {size / 1e6:,.0f} MB, and {_SMALL / 1e6:.0f} MB are the most",
        )
    count = min(threads, trials, _PROCESSES)
    return count, f"the model is small ({size / 1e6:,.1f} MB), and processes of one thread wait for each other nowhere"


def _recorded(path: Path) -> int | None:
    """Among how many workers a sweep that lies there was shared out; what a merge that was killed has left is removed."""
    if not (path / WORKERS_FILE).exists():
        return None
    shares = read_json(path / WORKERS_FILE)["shares"]
    if (path / WHERE_FILE).exists():
        tidy(path, len(shares))
        return None
    return len(shares)


class _Shared:
    """A sweep in several processes while it goes."""

    def __init__(
        self,
        ready: Ready,
        shares: list[list[str]],
        say: _Say,
        watch: _Watch | None,
        before: Callable[[], object] | None,
    ) -> None:
        self.ready, self.shares, self.say, self.before = ready, shares, say, before
        self.watch = watch or (lambda name, record: None)
        self.path = ready.asked.folder
        self.results = {trial.name: Result(trial, trial.name) for trial in ready.asked.trials}
        self.threads = max(1, (ready.asked.job.threads or torch.get_num_threads()) // len(shares))
        self.heard: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()

    def run(self) -> list[Result]:
        """All of it, from the folders of the workers to the one folder."""
        with held(self.path, self.say), caught() as wish:
            self._claim()
            missing = [n for n, names in enumerate(self.shares, 1) if not share_is_done(self.path, n, names)]
            self._tell_done(missing)
            workers: dict[int, Worker] = {}
            try:
                for number in missing:
                    workers[number] = self._start(number)
                self._listen(workers, wish)
            finally:
                for worker in workers.values():
                    worker.close()
            self._refuse_unfinished(workers.values(), wish)
            merge(self.path, self.shares, self.results)
        results = list(self.results.values())
        if all(result.ended and not result.records for result in results):
            raise ConfigError(results[0].ended)
        return results

    def _claim(self) -> None:
        recorded = read_json(self.path / WORKERS_FILE) if (self.path / WORKERS_FILE).exists() else None
        if self.ready.asked.job.resume and recorded:
            if recorded["shares"] != self.shares:
                raise CheckpointError(
                    f"{self.path}: a sweep of other trials lies there; set them back, or begin anew with --overwrite (overwrite=True)"
                )
            return
        clear(self.path)
        write_file(self.path / WORKERS_FILE, json.dumps({"shares": self.shares}))

    def _tell_done(self, missing: Sequence[int]) -> None:
        """What an earlier attempt brought to its end, for whoever watches."""
        for number, names in enumerate(self.shares, 1):
            if number not in missing:
                own = {name: self.results[name] for name in names}
                read_state(worker_folder(self.path, number), own)
                for name, result in own.items():
                    step = max((record["step"] for record in result.records), default=0)
                    self.watch(name, {"step": step, "before": True})
                    self.watch(name, {"step": step, "ended": result.ended})
        if missing:
            self.say(
                f"{len(missing)} worker{'s' * (len(missing) > 1)} with {self.threads} thread{'s' * (self.threads > 1)} each"
            )

    def _start(self, number: int) -> Worker:
        """A worker for its share, with its part of the threads."""
        asked, own = self.ready.asked, set(self.shares[number - 1])
        out = str(worker_folder(self.path, number))
        job = replace(asked.job, out=out, threads=self.threads, resume=True, overwrite=False)
        trials = tuple(trial for trial in asked.trials if trial.name in own)
        return Worker(number, replace(asked, job=job, trials=trials), self.threads, self.before, self.heard)

    def _listen(self, workers: dict[int, Worker], wish: Any) -> None:
        """Until all have ended; what they say is said, and a wish to end goes on to all."""
        alive = set(workers)
        while alive:
            if wish.signal is not None:
                for worker in workers.values():
                    worker.stop()
            try:
                number, message = self.heard.get(timeout=0.2)
            except queue.Empty:
                continue
            worker = workers[number]
            if message is None:
                alive.remove(number)
                self._ended(worker, len(alive))
            elif "record" in message:
                self.watch(message["of"], message["record"])
            elif "say" in message:
                self.say(f"worker {number}: {message['say']}")
            elif "error" in message:
                worker.error = (message["error"][0], message["error"][1])
            else:
                worker.done = "done" in message
                worker.stopped |= "interrupted" in message

    def _ended(self, worker: Worker, others: int) -> None:
        words = worker.close()
        if worker.done or worker.stopped:
            return
        worker.error = worker.error or ("TrainingError", words)
        going = f"; the other{'s go' if others > 1 else ' goes'} on" if others else ""
        self.say(f"{worker.called} ended before its work: {worker.error[1]}{going}")

    def _refuse_unfinished(self, workers: Any, wish: Any) -> None:
        """Raise what happened, where a share is not done; the table says how far all came."""
        failed: Sequence[Worker] = [worker for worker in workers if worker.error]
        stopped = [worker for worker in workers if not worker.done]
        if not stopped:
            return
        partial_table(self.path, self.shares, self.results)
        saved = f"saved in {self.path}; go on with --resume (resume=True)"
        if wish.signal is not None:
            done = max((record["step"] for r in self.results.values() for record in r.records), default=0)
            raise Interrupted(f"{wish.name} after step {done} of the sweep: {saved}", cast(int, wish.signal))
        if failed:
            kind, words = cast(tuple[str, str], failed[0].error)
            made = getattr(errors, kind, TrainingError)
            error = made if issubclass(made, MiniLoraError) and made is not Interrupted else TrainingError
            raise error(f"{failed[0].called}: {words}; what was done is {saved}")
        raise TrainingError(f"{stopped[0].called} was ended; what was done is {saved}")

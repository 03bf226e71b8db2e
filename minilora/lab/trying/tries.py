"""Claims tried: one in this process, or many shared out among processes of one thread each, with a page of all.

    tried = try_claim("rank-lr", Ground())
    try_into(Path("docs"), ["rank-lr"], workers=2)      # docs/lab.md, docs/lab.json, docs/lab/rank-lr.svg

A folder keeps what is done: after Ctrl-C, the same call goes on with what is missing. Next file: ``lab/trying/page.py``.
"""

from __future__ import annotations

import queue
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import minilora.lab.claims as claims_folder
from minilora.errors import ConfigError, Interrupted, MiniLoraError
from minilora.files.validate import whole
from minilora.lab.claims import claim
from minilora.lab.ground.claim import FAILS, HOLDS, UNDECIDED, Finding
from minilora.lab.ground.ground import STEPS, Ground
from minilora.lab.trying.page import write_page
from minilora.lab.trying.tried import Tried, digest, processor, read, write
from minilora.measure.worker import Worker
from minilora.training.lock import held
from minilora.training.signals import Wish, caught

__all__ = ["answers", "try_claim", "try_into"]

Say = Callable[[str], None]
_BLINK = 0.2  # seconds after which a signal is looked for


def try_claim(name: str, ground: Ground) -> Tried:
    """What comes of a claim here. Raises whatever the claim does, and ``ConfigError`` for one that is not known."""
    module, began = claim(name), time.perf_counter()
    finding = module.run(ground)
    if not isinstance(finding, Finding) or finding.verdict not in (HOLDS, FAILS, UNDECIDED):
        raise ConfigError(
            f"claim {name!r}: run returned {str(finding)[:80]}; wanted a Finding with one of the three verdicts"
        )
    seconds = round(time.perf_counter() - began, 1)
    return _untried(name, ground.steps, finding=finding, seconds=seconds, place=processor())


def _untried(name: str, steps: int, **more: Any) -> Tried:
    module = claim(name)
    place = module.__name__.removeprefix("minilora.").replace(".", "/")
    return Tried(module.CLAIM, place, digest(module), steps, **more)


def try_into(
    folder: Path,
    names: Sequence[str],
    *,
    steps: int = STEPS,
    workers: int = 1,
    overwrite: bool = False,
    say: Say = print,
) -> dict[str, Tried]:
    """Try claims, and write findings and page into ``folder`` (made if need be). A claim that fails costs the others nothing.

    Args:
        names: of claims; those whose finding is there already are not tried again. steps: of every trial. workers: processes, each of
            one thread and with a ground of its own. overwrite: forget the findings of ``names`` that are there.

    Returns:
        All that the folder holds now, claims of before included.

    Raises:
        ConfigError: no such claim, or findings are there that were made with other ``steps``. CheckpointError: ``lab.json`` is damaged, or
            another process is writing there. Interrupted: by a signal; what is done is kept.
    """
    whole("steps", steps, 1)
    whole("workers", workers, 1)
    found, missing = _claimed(folder, names, steps, overwrite, say)
    with held(folder, say), caught() as wish:
        try:
            with closing(_tries(missing, steps, workers, wish)) as coming:
                for done, tried in enumerate(coming, 1):
                    found[tried.claim.name] = tried
                    write(folder, found)
                    came = f"could not be tried: {tried.failed}" if tried.finding is None else tried.finding.verdict
                    say(f"{tried.claim.name}: {came}; {tried.seconds:,.0f} s ({done} of {len(missing)})")
        finally:
            write(folder, found)
            write_page(folder, found)
    if wish.signal is not None:
        left = ", ".join(name for name in missing if name not in found)
        raise Interrupted(
            f"{wish.name}: {folder} keeps what is done; the same command goes on with {left}", wish.signal
        )
    return found


def _claimed(
    folder: Path, names: Sequence[str], steps: int, overwrite: bool, say: Say
) -> tuple[dict[str, Tried], list[str]]:
    """What of the folder stays, and the claims that are missing."""
    now = {name: digest(claim(name)) for name in names}
    found = read(folder)
    for name in names:
        kept = found.get(name)
        if kept is None or overwrite or kept.finding is None:
            found.pop(name, None)
        elif kept.steps != steps:
            raise ConfigError(
                f"{folder}: its finding on {name} is of {kept.steps} steps, not {steps}; "
                "give --steps as then, --overwrite to try it anew, or another folder"
            )
        elif kept.digest != now[name]:
            say(f"{name}: its file is another one than that of its finding; it is tried anew")
            del found[name]
    return found, [name for name in dict.fromkeys(names) if name not in found]


# ---- many processes


def _tries(names: Sequence[str], steps: int, workers: int, wish: Wish) -> Generator[Tried, None, None]:
    """What comes of each, as it comes; ends early once a signal wishes it."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[Tried] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    running: list[Worker] = []
    settings = {"steps": steps, "folders": list(claims_folder.__path__)}
    count = max(1, min(workers, len(names)))
    with ThreadPoolExecutor(count) as threads, _ended(running, waiting):
        hands = [threads.submit(_hand, settings, waiting, done, running) for _ in range(count)]
        for _ in names:
            while done.empty() and wish.signal is None and not all(hand.done() for hand in hands):
                time.sleep(_BLINK)
            if wish.signal is not None:
                return
            if done.empty():
                break
            yield done.get()
        for hand in hands:
            hand.result()  # which raises what no claim has caused


@contextmanager
def _ended(running: list[Worker], waiting: queue.SimpleQueue[str]) -> Iterator[None]:
    """At the end nothing waits, and no process goes on."""
    try:
        yield
    finally:
        while not waiting.empty():
            waiting.get()
        for worker in list(running):
            worker.kill()


def _hand(
    settings: dict[str, Any], waiting: queue.SimpleQueue[str], done: queue.SimpleQueue[Tried], running: list[Worker]
) -> None:
    """Give one process claim after claim, and a new process takes the place of one that is gone."""
    while not waiting.empty():
        options: dict[str, Any] = {"threads": 1, "smaller": "try fewer --workers", "measured": False}
        with Worker("minilora.lab.trying.tries:answers", settings, **options) as worker:
            running.append(worker)
            try:
                while (name := _next(waiting)) is not None:
                    began = time.perf_counter()
                    try:
                        done.put(Tried.unpacked(worker.ask(name)))
                    except MiniLoraError as error:
                        seconds = round(time.perf_counter() - began, 1)
                        done.put(_untried(name, settings["steps"], failed=str(error), seconds=seconds))
                        break
            finally:
                running.remove(worker)


def _next(waiting: queue.SimpleQueue[str]) -> str | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


def answers(settings: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """The side of the process: a ground, and what comes of each claim on it."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches every process of a terminal; the first one ends this one
    claims_folder.__path__[:] = settings["folders"]
    ground = Ground(settings["steps"], say=lambda line: None)

    def answer(name: str) -> dict[str, Any]:
        began = time.perf_counter()
        try:
            return try_claim(name, ground).packed()
        except Exception as error:
            why = str(error) if isinstance(error, MiniLoraError) else f"{type(error).__name__}: {error}"
            seconds = round(time.perf_counter() - began, 1)
            return _untried(name, ground.steps, failed=" ".join(why.split()), seconds=seconds).packed()

    return answer

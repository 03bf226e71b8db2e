"""Kill a training run at each of its calls to the disk, with a real SIGKILL, and let it go on by itself.

``python tests/training/training_kills.py FOLDER first stride`` prints how many points there are, how many were tried, and what each of them
that did not end in the very same files left. One child process for each run; a write is also torn in its middle.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import torch

import minilora.files.disk
from minilora import LoraConfig, inject
from minilora.data.encoding import Encoded
from minilora.data.tokens import IGNORED
from minilora.files.disk import Disk
from minilora.training.loop import TrainConfig, train
from tests.models import Words

CALLS = ("append", "flush", "make_folder", "copy_mode", "link", "rename", "exchange", "unlink", "remove_folder")
FILES = ("adapter_model.safetensors", "adapter_config.json", "minilora.json")
CONFIG = TrainConfig(steps=8, batch_size=2, accumulate=2, lr=0.02, save_every=2, keep_checkpoints=2, seed=1)


class Deadly(Disk):
    """Dies before its ``last``-th change of the disk; a write is two: before it, and with half of it done."""

    def __init__(self, last):
        self.left = last

    def spend(self):
        self.left -= 1
        return self.left == 0

    def write(self, path, content):
        if self.spend():
            die()
        if self.spend():
            super().write(path, content[: len(content) // 2])
            die()
        super().write(path, content)


def _deadly(name):
    plain = getattr(Disk, name)

    def call(self, *arguments):
        if self.spend():
            die()
        return plain(self, *arguments)

    return call


for _name in CALLS:
    setattr(Deadly, _name, _deadly(_name))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def run(folder, disk, resume):
    minilora.files.disk.used = disk
    torch.manual_seed(5)
    model = inject(Words(), LoraConfig(r=2, lora_alpha=3, lora_dropout=0.2, target_modules=["head"]))
    rows = [[(7 * i + 3 * j) % 29 for j in range(4 + i % 3)] for i in range(5)]
    data = [Encoded(tuple(row), (IGNORED, *row[1:])) for row in rows]
    train(model, data, CONFIG, folder, 29, resume=resume, say=lambda line: None)


def apart(work):
    """Run ``work`` in a process of its own; returns the signal that ended it, 0 for none, or raises if it failed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    if os.WEXITSTATUS(status):
        raise RuntimeError("the run failed")
    return 0


def outcome(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def main(place, first, stride):
    torch.set_num_threads(1)
    counter = Deadly(10**9)
    run(place / "whole", counter, resume=False)  # in this process: it counts
    points, wanted, tried, failed = 10**9 - counter.left, outcome(place / "whole"), 0, []
    steps = sorted(path.name for path in (place / "whole").glob("checkpoint-*"))
    for point in range(first, points + 1, stride):
        folder = place / f"run-{point}"
        tried += 1
        try:
            if apart(lambda: run(folder, Deadly(point), resume=False)) != signal.SIGKILL:  # noqa: B023
                raise RuntimeError("it was not killed")
            apart(lambda: run(folder, Disk(), resume=True))  # noqa: B023
            left = sorted(path.name for path in folder.iterdir() if path.name.startswith((".", "checkpoint-")))
            if outcome(folder) != wanted:
                failed.append(f"{point}: another adapter")
            elif left != steps:
                failed.append(f"{point}: {left}")
        except (RuntimeError, OSError) as error:
            failed.append(f"{point}: {error}")
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{points} points, {tried} tried, {len(failed)} failed")
    print("\n".join(failed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

"""Kill a save at every call that it makes to the system, and see what is left. Run by test_kills.py; by hand:

    python tests/files/kills.py                 # SIGKILL before every call, and in the middle of every write
    python tests/files/kills.py --strace        # the same with the kernel's own counting: strace -e inject=CALL:signal=SIGKILL:when=N

Each child is forked from this process, which has torch loaded, so that a point takes milliseconds.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from minilora import LoraConfig, inject, load_adapter, save_adapter
from minilora.data.encoding import Encoded
from minilora.files import disk as disk_module
from minilora.files.read import commit_of
from minilora.store.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from minilora.store.load import adapter_state_dict
from minilora.training.loop import TrainConfig, train
from tests.models import Words

torch.set_num_threads(1)
CALLS = ("open", "write", "fsync", "mkdir", "link", "replace", "unlink", "rmdir", "chmod")
SYSCALLS = [
    "openat",
    "write",
    "fsync",
    "mkdir",
    "mkdirat",
    "linkat",
    "link",
    "renameat2",
    "rename",
    "renameat",
    "unlink",
    "unlinkat",
    "rmdir",
    "chmod",
    "fchmodat",
    "close",
]


def adapted(seed):
    torch.manual_seed(seed)
    model = inject(Words(), LoraConfig(r=3, lora_alpha=12 + seed, target_modules=["mid", "head"]))
    with torch.no_grad():
        for tensor in adapter_state_dict(model).values():
            tensor.normal_()
    return model


def print_of(folder):
    """What the adapter in a folder is, as minilora loads it; None if there is none."""
    if not (folder / WEIGHTS_FILE).exists() and not (folder.is_dir() and commit_of(folder)):
        return None
    model = Words()
    load_adapter(model, folder)
    alpha = model._minilora_adapters.configs["default"].lora_alpha
    tensors = b"".join(tensor.numpy().tobytes() for tensor in adapter_state_dict(model).values())
    return alpha, hashlib.sha256(tensors).hexdigest()


def plain_pair(folder):
    """What a program that knows nothing of minilora finds: alpha and a hash."""
    config = json.loads((folder / CONFIG_FILE).read_text())
    return config["lora_alpha"], hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()


def save(folder, seed):
    save_adapter(adapted(seed), folder)


def fit(folder, seed):
    examples = [Encoded([1 + i, 2, 3, 4], [-100, 2, 3, 4]) for i in range(4)]
    config = TrainConfig(steps=2, batch_size=2, lr=0.01, save_every=1, seed=seed)
    train(adapted(seed), examples, config, folder, pad_id=0, overwrite=True)


def alone(folder):
    pass


def with_a_folder(folder):
    (folder / "notes").mkdir()
    (folder / "notes" / "x").write_text("mine")


# name: (what runs, how the folder is laid out, folders that hold an adapter)
SCENES = {
    "adapter": (save, alone, ["."]),
    "adapter beside a folder": (save, with_a_folder, ["."]),
    "training": (fit, alone, [".", "checkpoint-1", "checkpoint-2"]),
}


def die_at(point, half):
    """Make this process kill itself before its ``point``-th call, or in the middle of its ``point``-th write. Counts in COUNT."""
    count = [0]

    def watched(function, name):
        def call(*arguments, **named):
            if not half or name == "write":
                count[0] += 1
                if count[0] == point:
                    if half:
                        function(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, watched(getattr(os, name), name))
    if disk_module._renameat2 is not None:
        disk_module._renameat2 = watched(disk_module._renameat2, "renameat2")


def run_child(action, folder, prepare):
    """Fork; returns whether the child was killed."""
    sys.stdout.flush()
    if not (child := os.fork()):
        try:
            prepare()
            action(folder, 2)
            os._exit(0)
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)
            os._exit(1)
    return child


def killed(child):
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, f"the child ended with status {status}"
    return status != 0


def under_strace(action, folder, call, number):
    """One child with strace on it; returns whether it was killed."""
    child = run_child(action, folder, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    os.waitpid(child, os.WUNTRACED)
    inject = f"inject={call}:signal=SIGKILL:when={number}"
    tracer = subprocess.Popen(
        ["strace", "-qq", "-p", str(child), "-e", f"trace={call}", "-e", inject, "-o", "/dev/null"],
        stderr=subprocess.PIPE,
    )
    status = Path(f"/proc/{child}/status")
    deadline = time.monotonic() + 20
    while "TracerPid:\t0" in status.read_text() and time.monotonic() < deadline and tracer.poll() is None:
        time.sleep(0.002)
    os.kill(child, signal.SIGCONT)
    result = killed(child)
    tracer.wait()
    tracer.stderr.close()
    return result


class Scene:
    """A folder with an old adapter, one attempt to replace it, and what must hold after the attempt was killed."""

    def __init__(self, name, home):
        self.action, layout, self.places = SCENES[name]
        self.exchanged, self.template, self.home = name == "adapter", home / "template", home
        self.template.mkdir()
        self.action(self.template / "run", 1)
        (self.template / "run" / "README").write_text("mine")
        layout(self.template / "run")
        shutil.copytree(self.template, home / "finished")
        self.action(home / "finished" / "run", 2)
        self.allowed = {
            place: [print_of(at / "run" / place) for at in (self.template, home / "finished")] for place in self.places
        }
        if name == "training":  # it was told to remove the earlier run first
            self.allowed = {place: [*prints, None] for place, prints in self.allowed.items()}
        self.pairs = [plain_pair(at / "run") for at in (self.template, home / "finished")]

    def fresh(self):
        work = self.home / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.template, work)
        return work / "run"

    def check(self, folder):
        """Old or new now, and nothing left behind after the next run."""
        for place in self.places:
            assert print_of(folder / place) in self.allowed[place], f"{place} is neither old nor new"
        if self.exchanged:
            assert plain_pair(folder) in self.pairs, "the two files do not belong together"
        assert (folder / "README").read_text() == "mine"
        if (folder / "log.jsonl").exists():
            for line in (folder / "log.jsonl").read_text().split("\n")[:-1]:  # the last may be half
                json.loads(line)
        self.action(folder, 2)
        for place in self.places:
            assert print_of(folder / place) == self.allowed[place][1]
        assert not list(folder.parent.rglob(".*")), f"left behind: {list(folder.parent.rglob('.*'))}"


def kill_everywhere(scene):
    """Points at which the child was killed; each was checked."""
    points = 0
    for half in (False, True):
        at = 1
        while True:
            folder = scene.fresh()
            if not killed(run_child(scene.action, folder, lambda at=at, half=half: die_at(at, half))):
                break
            scene.check(folder)
            points, at = points + 1, at + 1
    return points


def strace_everywhere(scene):
    points = 0
    for call in SYSCALLS:
        number = 1
        while True:
            folder = scene.fresh()
            if not under_strace(scene.action, folder, call, number):
                break
            scene.check(folder)
            points, number = points + 1, number + 1
    return points


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("scenes", nargs="*", default=list(SCENES))
    parser.add_argument("--strace", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.scenes:
        with tempfile.TemporaryDirectory() as home:
            scene = Scene(name, Path(home))
            points = strace_everywhere(scene) if arguments.strace else kill_everywhere(scene)
            print(f"{name}: {points} kill points, {points} left the old or the new, 0 lost", flush=True)


if __name__ == "__main__":
    main()

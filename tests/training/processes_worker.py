"""Runs of several processes for ``test_processes.py``: what each process does, started by torchrun.

``torchrun ... processes_worker.py '[run, ...]'``: one after the other. A run is ``{"out": folder}`` and what differs from ``SETTINGS``;
what a process says at its end is a line of ``<out>.said``.
``harm`` is what goes wrong in one process: ``[rank, what, when]``, at the first start.
"""

import errno
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import minilora
import minilora.files.disk
import minilora.training.step as step_module
from minilora import LoraConfig, QuantConfig
from minilora.data.encoding import Encoded
from minilora.data.tokens import IGNORED
from minilora.errors import CheckpointError, MiniLoraError
from minilora.training.loop import TrainConfig, train
from minilora.training.processes import Processes, joined

SETTINGS = {"steps": 5, "accumulate": 4, "save_every": 2, "dropout": 0.1, "checkpointing": False, "shard": False,
            "resume": False, "harm": None, "folders": None, "experts": False, "lr": 0.02, "best": False,
            "optimizer": "adamw"}  # fmt: skip


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.rare = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 64)
        self.sees_rare = False

    def forward(self, x):
        x = x + self.down(torch.tanh(self.up(x)))
        return x + self.rare(x) if self.sees_rare else x


class Blocks(nn.Module):
    """A language model of three blocks. With ``experts``, some batches alone reach the layers ``rare``."""

    def __init__(self, experts=False):
        super().__init__()
        self.embed, self.head, self.experts, self.again = nn.Embedding(41, 64), nn.Linear(64, 41), experts, False
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs):
        self.again = True

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids).cumsum(1) / 4 * attention_mask.unsqueeze(-1)
        for number, block in enumerate(self.blocks):
            block.sees_rare = self.experts and (number == 0 or int(input_ids[0, 0]) % 3 == 0)
            x = checkpoint(block, x, use_reentrant=False) if self.again and self.training else block(x)
        return SimpleNamespace(logits=self.head(torch.tanh(x)))


def model_of(run, seed=5):
    torch.manual_seed(7)
    model = Blocks(run["experts"])
    minilora.quantize_model(model, QuantConfig(double_quant=True), target_modules=["up", "down", "rare"])
    torch.manual_seed(seed)
    targets = ["up", "down", "rare"] if run["experts"] else ["up", "down"]
    return minilora.inject(model, LoraConfig(r=3, lora_alpha=5, lora_dropout=run["dropout"], target_modules=targets))


def examples(count=23):
    rows = [[(7 * i + 3 * j + i * i) % 40 for j in range(4 + i % 5)] for i in range(count)]
    return [Encoded(tuple(row), (IGNORED, *row[1:])) for row in rows]


class Full(minilora.files.disk.Disk):
    """A disk on which there is no room for the checkpoint of step 4."""

    def write(self, path, content):
        if "checkpoint-4" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        super().write(path, content)


def counted(owner, name, at, act):
    """Before call number ``at`` of ``owner.name`` comes ``act()``; what it returns is called in its stead, if anything.

    Returns what takes it away again.
    """
    plain, calls = getattr(owner, name), []

    def call(*arguments, **named):
        calls.append(1)
        other = act() if len(calls) == at else None
        return (other or plain)(*arguments, **named)

    setattr(owner, name, call)
    return lambda: setattr(owner, name, plain)


def fail(error):
    raise error


def prepare(what, when):
    """Make it go wrong in this process; returns what makes it right again."""
    own, plain = os.getpid(), step_module.token_losses
    if what in ("kill", "stop"):
        number = signal.SIGKILL if what == "kill" else signal.SIGSTOP
        return counted(Processes, "share", when, lambda: os.kill(own, number))
    if what in ("SIGTERM", "SIGINT"):
        return counted(step_module, "token_losses", when, lambda: os.kill(own, getattr(signal, what)))
    if what == "nan":
        return counted(step_module, "token_losses", when, lambda: lambda *a: plain(*a) * float("nan"))
    if what == "memory":
        error = RuntimeError("can't allocate memory: 9 bytes")
        return counted(step_module, "token_losses", when, lambda: fail(error))
    if what == "error":
        return counted(step_module, "token_losses", when, lambda: fail(ZeroDivisionError("a fault of the model")))
    if what == "disk":
        usual, minilora.files.disk.used = minilora.files.disk.used, Full()
        return lambda: setattr(minilora.files.disk, "used", usual)
    return lambda: None


def work(run):
    """One process of a run, from load to adapter; returns its exit code."""
    rank, attempt = int(os.environ.get("RANK", "0")), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    harmed, what, when = run["harm"] or (-1, None, None)
    ill = rank == harmed and attempt == "0"
    out, began, data, seed = Path(run["out"]), time.monotonic(), examples(), 5
    folder = Path(run["folders"][rank]) if run["folders"] else out
    config = TrainConfig(
        run["steps"], 2, run["accumulate"], lr=run["lr"], save_every=run["save_every"], eval_every=2, seed=1,
        gradient_checkpointing=run["checkpointing"], keep_best=run["best"], patience=3 * run["best"],
        optimizer=run["optimizer"],
    )  # fmt: skip
    said = code = None
    repair = prepare(what, when) if ill else lambda: None
    try:
        with joined():
            if ill and what == "load":
                raise CheckpointError("model 'm': no such folder")
            if ill:
                data, seed = (data[1:] if what == "data" else data), (6 if what == "seed" else 5)
            records = train(
                model_of(run, seed), data[5:], config, folder, 40, data[:5], say=lambda line: None,
                resume=run["resume"] or attempt != "0", shard=run["shard"],
            )  # fmt: skip
        said, code = [record.get("loss", record.get("eval_loss")) for record in records], 0
    except MiniLoraError as error:
        said, code = None if error.told else f"{type(error).__name__}: {error}", error.exit_code
    repair()
    line = {"rank": rank, "said": said, "code": code, "seconds": time.monotonic() - began}
    with open(f"{out}.said", "a") as file:
        file.write(json.dumps(line) + "\n")
    return code


if __name__ == "__main__":
    torch.set_num_threads(1)
    codes = [work(SETTINGS | one) for one in json.loads(sys.argv[1])]
    sys.exit(max(codes))

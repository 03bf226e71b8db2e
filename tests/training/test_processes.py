"""One result, whatever the number of processes; and one end, whatever happens to one of them."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import minilora
from minilora import LoraConfig
from minilora.errors import ConfigError, StateError
from minilora.training import processes as module
from minilora.training.processes import ALONE, Processes, joined
from minilora.training.sharding import blocks_of, refuse_skipping, shard_blocks
from minilora.training.step import _pairwise, gradients
from minilora.training.together import refuse_different
from tests.training import processes_worker as worker

SCRIPT = str(Path(worker.__file__))
ADAPTER = "adapter_model.safetensors"
needs_gloo = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no processes")


def environment():
    paths = os.pathsep.join([str(Path(SCRIPT).parents[2]), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def begin(size, runs, *flags):
    """A torchrun of ``size`` processes that goes through the runs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size), *flags]
    command += [SCRIPT, json.dumps(runs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment())


def torchrun(size, runs, *flags):
    """What it printed, and its exit code."""
    started = begin(size, runs, *flags)
    printed, _ = started.communicate(timeout=900)
    return printed, started.returncode


def ends(out):
    """What the processes of a run said at their end: ``{rank, said, code, seconds}``."""
    return [json.loads(line) for line in Path(f"{out}.said").read_text().splitlines()]


def losses(out):
    """The records of a finished run, which all its processes have alike."""
    found = [end["said"] for end in ends(out)]
    assert all(end["code"] == 0 for end in ends(out)) and all(one == found[0] for one in found)
    return found[0]


def adapter(folder):
    return (Path(folder) / ADAPTER).read_bytes()


KINDS = {
    "plain": {},
    "recomputed": {"checkpointing": True},
    "layers that some batches miss": {"experts": True},
    "A frozen by the optimizer": {"optimizer": "lora_fa"},
    "the best of a run that stops": {"best": True, "lr": 0.1, "steps": 14, "save_every": 0},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """``{kind: folder}`` of runs of one process, made when they are asked for."""
    place = tmp_path_factory.mktemp("alone")

    class Made(dict):
        def __missing__(self, name):
            assert worker.work(worker.SETTINGS | KINDS[name] | {"out": str(place / name)}) == 0
            self[name] = place / name
            return self[name]

    return Made()


def check(place, size, alone, kinds=KINDS):
    runs = {f"{name}{' in shards' * shard}": KINDS[name] | {"shard": shard} for name in kinds for shard in (0, 1)}
    printed, code = torchrun(size, [{**fields, "out": str(place / name)} for name, fields in runs.items()])
    assert code == 0, printed[-3000:]
    for name in runs:
        whole = alone[name.removesuffix(" in shards")]
        assert losses(place / name) == losses(whole), name
        assert adapter(place / name) == adapter(whole), name
        assert len(ends(place / name)) == size


@needs_gloo
def test_two_processes_train_the_bits_of_one(tmp_path, alone):
    check(tmp_path, 2, alone, ["plain", "the best of a run that stops"])
    records = losses(alone["the best of a run that stops"])
    assert len(records) < 14 + 8 and not (tmp_path / "the best of a run that stops" / "checkpoint-14").exists()


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_all_kinds_of_runs_of_more_processes_train_the_bits_of_one(tmp_path, alone, size):
    check(tmp_path, size, alone)
    assert len({adapter(alone[name]) for name in KINDS}) == 4  # recomputing changes nothing, other layers do


@needs_gloo
@pytest.mark.slow
def test_three_processes_have_no_fixed_order_and_stay_close(tmp_path, alone):
    torchrun(3, [{"out": str(tmp_path / "three")}])
    for here, there in zip(losses(tmp_path / "three"), losses(alone["plain"]), strict=True):
        assert here == pytest.approx(there, abs=1e-6)
    state = json.loads((tmp_path / "three" / "checkpoint-4" / "training.json").read_text())
    assert state["meaning"]["bits"]["order of sums"] == "all-reduce over 3 processes"


# ---- going on


@needs_gloo
@pytest.mark.slow
def test_four_in_shards_then_one_then_two_end_in_the_bits_of_one(tmp_path, alone):
    run = {"out": str(tmp_path / "run")}
    torchrun(4, [run | {"shard": True, "harm": [2, "SIGTERM", 2]}])  # in its second step
    assert {end["code"] for end in ends(run["out"])} == {128 + signal.SIGTERM}
    worker_environment = environment()
    one = run | {"resume": True, "harm": [0, "SIGTERM", 6]}
    subprocess.run([sys.executable, SCRIPT, json.dumps([one])], env=worker_environment, timeout=900)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    torchrun(2, [run | {"resume": True}])
    assert adapter(run["out"]) == adapter(alone["plain"])


POINTS = range(1, 21)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", POINTS)
def test_a_process_that_is_killed_is_started_again_to_the_same_bits(tmp_path, alone, rank, point):
    run = {"out": str(tmp_path / "run"), "harm": [rank, "kill", point]}
    printed, code = torchrun(2, [run], "--max-restarts", "1")
    assert code == 0, printed[-3000:]
    assert adapter(run["out"]) == adapter(alone["plain"])
    assert "exitcode: -9" in printed  # or the point is after the end


@needs_gloo
@pytest.mark.slow
def test_sigterm_of_torchrun_ends_all_after_a_step_and_resume_goes_on(tmp_path, alone):
    run = {"out": str(tmp_path / "run"), "steps": 500}
    started = begin(2, [run])
    log = tmp_path / "run" / "log.jsonl"
    while not (log.exists() and log.read_text().count("grad_norm") > 2):
        assert started.poll() is None
        time.sleep(0.02)
    started.terminate()
    started.communicate(timeout=120)
    assert {end["code"] for end in ends(run["out"])} == {128 + signal.SIGTERM}
    (said,) = (end["said"] for end in ends(run["out"]) if end["said"])
    assert re.match(r"Interrupted: SIGTERM after step \d+ of 500: saved in ", said), said
    step = int(re.search(r"after step (\d+)", said)[1])
    state = json.loads((tmp_path / "run" / f"checkpoint-{step}" / "training.json").read_text())
    assert state["step"] == step
    whole = {"steps": step + 2, "out": str(tmp_path / "whole")}
    for fields in (
        whole,
        whole | {"out": run["out"]},
    ):  # the rate depends on the length of a run: another one is refused
        code = torchrun(2, [fields | {"resume": True}])[1]
    assert code and "another schedule" in next(end["said"] for end in ends(run["out"])[-2:] if end["said"])


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("owner", [0, 1])
def test_two_folders_whichever_of_them_holds_the_checkpoint(tmp_path, alone, owner):
    """As on two machines, one process each, where another one is the first after a restart."""
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    first = {"out": str(tmp_path / "run"), "folders": folders, "harm": [1, "SIGTERM", 6]}  # in its third step
    agents(first)
    assert (tmp_path / "a" / "checkpoint-3").is_dir() and not (tmp_path / "b").exists()
    again = first | {"harm": None, "resume": True, "folders": folders if owner == 0 else folders[::-1]}
    agents(again)
    assert adapter(again["folders"][0]) == adapter(alone["plain"])
    lines = (Path(again["folders"][0]) / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "grad_norm" in line] == [1, 2, 3, 4, 5]


def agents(run):
    """Two torchruns of one process each, which meet."""
    flags = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "7", "--rdzv-endpoint", f"localhost:{free_port()}"]
    started = [begin(1, [run], *flags) for _ in range(2)]
    for process in started:
        process.communicate(timeout=900)


def free_port():
    import socket

    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


# ---- one end


NO_MEMORY = r"OutOfMemory: step 3: no memory for batch_size=2 .* in process 1 of 2.*saved in .*checkpoint-2"
FAULT = "Elsewhere: process 1 of 2: ZeroDivisionError: a fault of the model"
FIRST = "StateError: the first step has no finite gradient: the loss is nan in micro-batch 3 .process 1 of 2."
ILL = {
    "a loss of one": ([1, "nan", 5], {}, None),
    "a first loss of one": ([1, "nan", 1], {}, FIRST),
    "memory of one": ([1, "memory", 5], {}, NO_MEMORY),
    "a fault of one": ([1, "error", 5], {}, FAULT),
    "a full disk": ([0, "disk", 0], {}, "WriteError: process 0 of 2: .*No space left"),
    "a model that one lacks": ([1, "load", 0], {}, "Elsewhere: process 1 of 2: model 'm': no such folder"),
    "other data": ([1, "data", 0], {}, "ConfigError: process 1 of 2 has another data file than process 0"),
    "another start": ([1, "seed", 0], {}, "ConfigError: process 1 of 2 has another start of the adapter"),
    "a signal to one": ([1, "SIGTERM", 5], {}, "Interrupted: SIGTERM after step 3 of 5: saved in .*checkpoint-3"),
    "one that is stopped": ([1, "stop", 12], {}, "Elsewhere: process 1 of 2 is gone: no sign of life for 30 s"),
    "too many processes": (None, {"accumulate": 1}, "ConfigError: accumulate=1: the 2 processes share"),
}


ALONE_IN_A_START = ("a signal to one", "one that is stopped")  # what comes after it would be another test


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """``(folder, printed)`` of the others, one after the other in the same two processes."""
    place = tmp_path_factory.mktemp("ended")
    runs = [
        {"out": str(place / name), "harm": harm, **fields}
        for name, (harm, fields, _) in ILL.items()
        if name not in ALONE_IN_A_START
    ]
    return place, torchrun(2, runs)[0]


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("what", ILL)
def test_all_end_together_with_one_line_that_names_the_process(tmp_path, ended, what):
    (harm, fields, line), (place, printed) = ILL[what], ended
    if what in ALONE_IN_A_START:
        place = tmp_path
        printed, _ = torchrun(2, [{"out": str(place / what), "harm": harm, **fields}])
    if line is None:  # the step is left out by all
        assert len([loss for loss in losses(place / what) if loss is None]) == 1
        return
    found = ends(place / what)
    told = [end["said"] for end in found if end["said"]]
    assert len(told) == 1 and re.match(line, told[0]), (found, printed[-2000:])
    assert len(found) == (1 if "stopped" in what else 2), (found, printed[-2000:])
    assert all(end["code"] and end["seconds"] < 60 for end in found)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("harm", ["memory", "error"])
def test_in_shards_who_waits_for_one_that_failed_is_ended_after_the_last_step_is_saved(tmp_path, alone, harm):
    run = {"out": str(tmp_path / "run"), "save_every": 0, "shard": True}
    began = time.monotonic()
    printed, code = torchrun(2, [run | {"harm": [1, harm, 5]}])
    said = "step 3: no memory for batch_size=2" if harm == "memory" else "ZeroDivisionError: a fault of the model"
    assert code and printed.count(f"process 1 of 2: {said}") == 1, printed[-3000:]
    assert time.monotonic() - began < 100  # 60 s, and the start
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    torchrun(2, [run | {"resume": True}])
    assert adapter(run["out"]) == adapter(alone["plain"])


# ---- without processes


def many(size):
    """``size`` processes that say nothing to each other."""
    found = [Processes() for _ in range(size)]
    for rank, one in enumerate(found):
        one.rank, one.size = rank, size
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("count", [1, 3, 4, 8, 12])
def test_every_micro_batch_is_one_process_s(size, count):
    assert [number for one in many(size) for number in one.part(count)] == list(range(count))


@pytest.mark.parametrize("count", [4, 8, 12, 20])
@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_processes_are_branches_of_one_tree(count, size):
    values = torch.randn(count, generator=torch.Generator().manual_seed(3)) * 10 ** torch.arange(count).remainder(7)
    sums = [tree(values, one.part(count)) for one in many(size)]
    while len(sums) > 1:  # as recursive doubling adds them
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    assert all(one.is_exact(count) for one in many(size))
    assert torch.equal(sums[0], tree(values, range(count)))


def tree(values, part):
    """The sum of these gradients of one parameter."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    return _pairwise([parameter], part, lambda number: (parameter * values[number]).backward())[0]


def test_the_tree_adds_neighbours():
    values = torch.tensor([1e8, 1.0, -1e8, 1.0])  # one after the other they are 1, in pairs 0
    assert tree(values, range(4)).item() == 0.0 and tree(values, range(1, 4)).item() == -1e8


@pytest.mark.parametrize(("size", "count", "exact"), [(1, 7, True), (2, 6, True), (2, 3, False), (3, 6, False), (8, 4, False)])  # fmt: skip
def test_when_the_order_is_fixed(size, count, exact):
    assert many(size)[0].is_exact(count) is exact


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2"}, "RANK=not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK=2"),
        ({"RANK": "-1"}, "RANK='-1'"),
    ],
)
def test_an_environment_that_torchrun_does_not_make(monkeypatch, given, words):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="wanted what torchrun sets") as caught, joined():
        pytest.fail("joined")
    assert words in str(caught.value)


def test_nccl_that_is_missing_is_said_in_one_line(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(ImportError, match="this torch has no NCCL") as caught, joined():
        pytest.fail("joined")
    assert "\n" not in str(caught.value)


def test_one_process_needs_no_torch_distributed():
    code = "import sys, minilora.training.loop as loop\nwith loop.joined() as p: assert p.size == 1 and p.share(3) == [3]\n"
    code += "assert not any(name.startswith('torch.distributed.fsdp') for name in sys.modules)\n"
    code += "import torch; assert not torch.distributed.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


def test_inside_a_block_the_processes_are_the_same():
    with joined() as outer, joined() as inner:
        assert outer is inner is ALONE


def test_the_blocks_are_the_longest_list():
    model = SimpleNamespace(modules=worker.Blocks().modules)
    assert [type(block) for block in blocks_of(model)] == [worker.Block] * 3
    with pytest.raises(Exception, match="no list of blocks to shard; leave --shard out"):
        blocks_of(torch.nn.Linear(2, 3))


def test_a_model_that_leaves_blocks_out_at_random_is_not_shared():
    model = worker.Blocks()
    model.layerdrop = 0.0
    refuse_skipping(model)
    model.blocks[0].config = SimpleNamespace(decoder_layerdrop=0.2)
    with pytest.raises(StateError, match=r"Blocks leaves blocks out at random \(decoder_layerdrop=0.2\)"):
        shard_blocks(model, many(2)[0])


def test_what_processes_differ_in_is_named(monkeypatch):
    def meaning(**bits):
        return dict.fromkeys(("training", "adapter", "data", "base")) | {"bits": bits}

    own = meaning(torch="2.9", threads=1, attention="sdpa", packed=True)
    for other, words in [
        (meaning(torch="2.8", threads=1, attention="sdpa", packed=True), "version of torch"),
        (meaning(torch="2.9", threads=2, attention="sdpa", packed=True), "number of threads"),
        (meaning(torch="2.9", threads=1, attention="eager", packed=True), "implementation of attention"),
        (meaning(torch="2.9", threads=1, attention="sdpa", packed=False), "answer whether examples can be packed"),
    ]:
        said = []
        first, second = many(2)
        monkeypatch.setattr("minilora.training.together._digest", lambda *a: "")
        for one, means in ((first, own), (second, other)):
            monkeypatch.setattr(one, "share", lambda value, said=said: said.append(value) or [value])
            refuse_different(one, means, "", None, "")
        monkeypatch.setattr(first, "share", lambda value, said=said: said)
        with pytest.raises(ConfigError, match=f"process 1 of 2 has another {words} than process 0"):
            refuse_different(first, own, "", None, "")


def test_a_micro_batch_that_reaches_no_adapter_adds_nothing():
    torch.manual_seed(7)
    model = minilora.inject(worker.Blocks(True), LoraConfig(r=3, lora_alpha=5, target_modules=["blocks.1.rare"]))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in named.values():
            parameter.normal_(std=0.1)
    every = worker.examples()
    reaching = [[one] for one in every if one.input_ids[0] % 3 == 0]
    others = [[one] for one in every if one.input_ids[0] % 3]

    def found(batches):
        model.zero_grad()
        total, norm, problem = gradients(model, named, batches, 40, list(range(len(batches))))
        assert problem is None and math.isfinite(total)
        return norm, [None if parameter.grad is None else parameter.grad.clone() for parameter in named.values()]

    norm, mixed = found([others[0], reaching[0], others[1], reaching[1]])
    _, alone = found(reaching[:2])
    own, rest = (sum(one.supervised for (one,) in part[:2]) for part in (reaching, others))
    share = own / (own + rest)  # of the tokens of the step
    for one, other in zip(mixed, alone, strict=True):
        assert other.any() and torch.allclose(one, other * share, rtol=1e-5, atol=1e-8)
    assert found(others[:2]) == (0.0, [None, None]) and norm > 0

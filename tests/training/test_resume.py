"""Going on: from every step, to the same bits, past what is damaged, and never with another run's data, settings or base."""

import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import minilora
import minilora.training.loop as loop
import minilora.training.step as step_module
from minilora import LoraConfig, QuantConfig, inject, quantize_model
from minilora.data.encoding import Encoded
from minilora.data.tokens import IGNORED
from minilora.errors import CheckpointError, ConfigError, Interrupted, MiniLoraError, StateError, WriteError
from minilora.training.checkpoint import _state_bytes
from minilora.training.loop import TrainConfig, train
from minilora.training.resume import newest
from minilora.training.settings import SCHEDULE, SINCE
from tests.models import Words, moe

PAD = 40


def examples(count, seed=0):
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        tokens = [draw.randrange(40) for _ in range(draw.randrange(4, 12))]
        made.append(Encoded(tuple(tokens), (IGNORED, IGNORED, *tokens[2:])))
    return made


EXAMPLES = examples(7)
LORA = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.2, "target_modules": ["mid", "head"]}
FIELDS = {"steps": 9, "batch_size": 2, "accumulate": 2, "lr": 0.02, "warmup": 0.2, "weight_decay": 0.1, "seed": 3}


@pytest.fixture(autouse=True)
def plain_signals():
    """A shell may start the tests with Ctrl-C ignored, which a run would respect."""
    before = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before:
        signal.signal(number, handler)


def fresh(base=None, variant=None, seed=1, **lora):
    model = base or Words()
    torch.manual_seed(seed)
    return inject(model, LoraConfig(**(LORA | lora)), variant=variant)


def run(model, folder, data=EXAMPLES, evaluation=(), watch=None, resume=False, say=None, **fields):
    said = [] if say is None else say
    config = TrainConfig(**(FIELDS | fields))
    return train(model, data, config, folder, PAD, evaluation, None, watch, resume=resume, say=said.append)


def files_of(folder):
    """Name to bytes of what a finished run leaves, its log but for the times."""
    return {name: (folder / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")}


def lasting(records):
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s", "rss_mb")} for r in records]


def as_if_killed_after(step, whole, folder):
    """What a run leaves that dies somewhere after its checkpoint of this step: the later log lines are there, the adapter is not."""
    shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(whole / "log.jsonl", folder)


# ---- the same bits


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs, with a checkpoint of every step: ``(folder, records)``."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(fresh(), folder, evaluation=EXAMPLES[:2], save_every=1, keep_checkpoints=99, eval_every=2)


@pytest.mark.parametrize("step", range(1, FIELDS["steps"] + 1))
def test_a_run_goes_on_from_every_step_to_the_same_bits(whole, tmp_path, step):
    as_if_killed_after(step, whole[0], tmp_path)
    torch.manual_seed(99)  # whatever the new process has drawn
    records = run(fresh(seed=8), tmp_path, evaluation=EXAMPLES[:2], save_every=1, eval_every=2, resume=True)
    assert files_of(tmp_path) == files_of(whole[0])
    assert lasting(records) == lasting(whole[1])
    assert lasting(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())) == lasting(whole[1])
    for name in ("optimizer.safetensors", "training.json"):
        last = f"checkpoint-{FIELDS['steps']}"
        assert (tmp_path / last / name).read_bytes() == (whole[0] / last / name).read_bytes()


def test_how_often_is_saved_and_evaluated_changes_nothing(whole, tmp_path):
    run(fresh(), tmp_path)
    assert files_of(tmp_path) == files_of(whole[0])


def test_seven_examples_in_batches_of_four_go_on_in_the_middle_of_an_epoch():
    assert FIELDS["batch_size"] * FIELDS["accumulate"] % len(EXAMPLES) and FIELDS["steps"] * 4 > 3 * len(EXAMPLES)


VARIANTS = {
    "rslora, lora_bias": (None, {"use_rslora": True, "lora_bias": True}),
    "dora": (None, {"use_dora": True}),
    "vera": ("vera", {}),
    "lora_fa": ("lora_fa", {}),
    "lora_xs": ("lora_xs", {}),
    "pissa": (None, {"init_lora_weights": "pissa"}),
    "olora": (None, {"init_lora_weights": "olora"}),
    "bias": (None, {"bias": "all"}),
    "a copy": (None, {"target_modules": ["mid"], "modules_to_save": ["head"]}),
    "embedding": (None, {"target_modules": ["embed", "mid"]}),
    "token rows": (None, {"target_modules": ["mid"], "trainable_token_indices": {"embed": [1, 5, 17]}}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_goes_on_to_the_same_bits(tmp_path, name):
    kind, lora = VARIANTS[name]
    run(fresh(variant=kind, **lora), tmp_path / "whole", save_every=4, keep_checkpoints=9)
    (tmp_path / "half").mkdir()
    as_if_killed_after(4, tmp_path / "whole", tmp_path / "half")
    # A start that is drawn differs from process to process unless it is seeded alike; what is decomposed does not.
    run(fresh(variant=kind, **lora), tmp_path / "half", resume=True)
    assert files_of(tmp_path / "half") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model_of_transformers_goes_on_to_the_same_bits(make_llama, tmp_path, quant, dtype):
    def made():
        model = make_llama(0).to(dtype)
        if quant:
            quantize_model(model, QuantConfig(quant, double_quant=True))
        return fresh(model, target_modules="all-linear")

    run(made(), tmp_path / "whole", save_every=5)
    (tmp_path / "half").mkdir()
    as_if_killed_after(5, tmp_path / "whole", tmp_path / "half")
    run(made(), tmp_path / "half", resume=True)
    assert files_of(tmp_path / "half") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_a_mixture_of_experts_goes_on_to_the_same_bits(tmp_path, quant):
    def made():
        model = moe()
        if quant:
            quantize_model(model, QuantConfig(quant, 32, True))
        return fresh(model, target_modules="all-linear")

    run(made(), tmp_path / "whole", save_every=5)
    (tmp_path / "half").mkdir()
    as_if_killed_after(5, tmp_path / "whole", tmp_path / "half")
    run(made(), tmp_path / "half", resume=True)
    assert files_of(tmp_path / "half") == files_of(tmp_path / "whole")


def test_without_a_checkpoint_it_begins_and_says_so(whole, tmp_path):
    said = []
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    run(fresh(), tmp_path, resume=True, say=said)
    assert said == ["no checkpoint yet: from the start"]
    assert files_of(tmp_path) == files_of(whole[0])
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == FIELDS["steps"]


def test_a_finished_run_stays_what_it_is(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "again")
    records = run(fresh(), tmp_path / "again", evaluation=EXAMPLES[:2], resume=True)
    assert files_of(tmp_path / "again") == files_of(whole[0]) and lasting(records) == lasting(whole[1])


def test_a_finished_run_without_a_checkpoint_is_not_run_again(tmp_path):
    run(fresh(), tmp_path)
    shutil.rmtree(tmp_path / f"checkpoint-{FIELDS['steps']}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        CheckpointError, match="holds an adapter and no checkpoint of its end, so there is nothing to go on with"
    ):
        run(fresh(), tmp_path, resume=True, lr=0.5)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_torn_log_costs_its_line_only(whole, tmp_path):
    as_if_killed_after(5, whole[0], tmp_path)
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_bytes(
        lines[0] + b'{"step": 2, "lo\n{"step": 2, "seconds": "x"}\n' + b"\x00\xff\n" + b"".join(lines[2:-1])
    )
    records = run(fresh(), tmp_path, evaluation=EXAMPLES[:2], eval_every=2, resume=True)
    assert lasting(records) == lasting([whole[1][0], *whole[1][2:]])
    assert files_of(tmp_path) == files_of(whole[0])


# ---- what a checkpoint is


def test_a_checkpoint_holds_no_code_and_is_an_adapter(whole, ids):
    folder = whole[0] / "checkpoint-4"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "minilora.json",
        "optimizer.safetensors",
        "training.json",
    ]
    model = Words()
    minilora.load_adapter(model, folder)
    state = json.loads((folder / "training.json").read_text())
    assert state["step"] == 4 and set(state["files"]) == set(names) - {"training.json"}


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_newest_are_kept(tmp_path, keep):
    run(fresh(), tmp_path, save_every=2, keep_checkpoints=keep)
    wanted = [9, 8, 6, 4][:keep]
    assert sorted(path.name for path in tmp_path.glob("check*")) == [f"checkpoint-{n}" for n in sorted(wanted)]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# ---- what is damaged


def test_what_does_not_verify_is_passed_over_and_said(whole, tmp_path):
    for step in (3, 5, 6, 7):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-7" / "training.json").unlink()
    weights = tmp_path / "checkpoint-6" / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    shutil.rmtree(tmp_path / "checkpoint-5")
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "checkpoint-5")  # of another step
    (tmp_path / "checkpoint-x").mkdir()
    said = []
    run(fresh(), tmp_path, evaluation=EXAMPLES[:2], resume=True, say=said)
    assert [line.split(":")[0] for line in said] == [
        f"skipped {tmp_path / 'checkpoint-7' / 'training.json'}",
        f"skipped {weights}",
        f"skipped {tmp_path / 'checkpoint-5' / 'training.json'}",
        "going on after step 3",
    ]
    assert all("\n" not in line for line in said)
    assert files_of(tmp_path) == files_of(whole[0])


@pytest.mark.parametrize(
    "name", ["training.json", "optimizer.safetensors", "adapter_model.safetensors", "minilora.json"]
)
def test_every_flipped_bit_is_found(whole, tmp_path, name):
    shutil.copytree(whole[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(whole[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    file, draw = tmp_path / "checkpoint-6" / name, random.Random(0)
    content = file.read_bytes()
    for _ in range(60):
        at, bit = draw.randrange(len(content)), draw.randrange(8)
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        said = []
        assert newest(tmp_path, said.append).step == 2
        assert len(said) == 1 and str(file) in said[0]
    file.write_bytes(content)
    assert newest(tmp_path, print).step == 6


def test_when_all_are_damaged_nothing_is_begun(whole, tmp_path):
    shutil.copytree(whole[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match="none of its 1 checkpoints is whole; restore one, or begin anew with --overwrite"
    ):
        run(fresh(), tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


# ---- another run


def another(**changed):
    return lambda: {"model": fresh(), "fields": changed}


OTHERS = {
    "steps": (another(steps=10), "another schedule: steps is 10, in the checkpoint 9"),
    "lr": (another(lr=0.03), "another schedule: lr is 0.03, in the checkpoint 0.02"),
    "warmup": (another(warmup=0.0), "another schedule: warmup is"),
    "schedule": (another(schedule="linear"), "another schedule: schedule is linear, in the checkpoint cosine"),
    "least rate": (another(min_lr_ratio=0.1), "another schedule: min_lr_ratio is 0.1, in the checkpoint 0.0"),
    "keep best": (another(keep_best=True, eval_every=2), "another schedule: eval_every is 2, in the checkpoint None"),
    "weight_decay": (another(weight_decay=0.0), "another schedule: weight_decay is"),
    "clip": (another(clip=0.5), "another schedule: clip is"),
    "seed": (another(seed=4), "another schedule: seed is 4"),
    "batch size": (another(batch_size=3), "another schedule: examples a step is 6, in the checkpoint 4"),
    "data": (lambda: {"model": fresh(), "data": examples(7, seed=1)}, "another data set: training data is"),
    "order of the data": (lambda: {"model": fresh(), "data": EXAMPLES[::-1]}, "another data set: training data"),
    "evaluation": (lambda: {"model": fresh(), "evaluation": EXAMPLES[:1]}, "another data set: evaluation data"),
    "rank": (lambda: {"model": fresh(r=4)}, "another adapter: r is 4, in the checkpoint 3"),
    "alpha": (lambda: {"model": fresh(lora_alpha=6)}, "another adapter: lora_alpha is 6"),
    "dropout": (lambda: {"model": fresh(lora_dropout=0.1)}, "another adapter: lora_dropout is 0.1"),
    "targets": (lambda: {"model": fresh(target_modules=["mid"])}, "another adapter: target_modules is ['mid']"),
    "base": (lambda: {"model": fresh(Words(seed=1))}, "another base model"),
    "packed base": (lambda: {"model": fresh(quantize_model(Words(), target_modules=["mid", "head"]))}, "another base"),
    "base in bfloat16": (lambda: {"model": fresh(Words().to(torch.bfloat16))}, "another base model"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused_by_name(whole, tmp_path, snapshot, name):
    as_if_killed_after(5, whole[0], tmp_path)
    make, words = OTHERS[name]
    given = {"evaluation": EXAMPLES[:2], "fields": {}} | make()
    before, files = snapshot(given["model"]), {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    fields = given.pop("fields")
    with pytest.raises(CheckpointError) as caught:
        run(folder=tmp_path, resume=True, **given, **fields)
    assert str(caught.value).startswith(f"{tmp_path / 'checkpoint-5'}: {words}") and "--overwrite" in str(caught.value)
    assert snapshot(given["model"]) == before
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def without(place, names):
    """The checkpoint as an older minilora wrote it, which did not know these settings."""
    file = place / "training.json"
    content = json.loads(file.read_text())
    for name in names:
        del content["meaning"]["training"][name]
    file.write_bytes(_state_bytes(content))


def test_a_checkpoint_that_is_older_than_a_setting_goes_on(whole, tmp_path):
    as_if_killed_after(5, whole[0], tmp_path)
    without(tmp_path / "checkpoint-5", SINCE)
    with pytest.raises(CheckpointError, match="schedule is wsd, in the checkpoint cosine"):
        run(fresh(), tmp_path, evaluation=EXAMPLES[:2], resume=True, schedule="wsd")
    run(fresh(seed=8), tmp_path, evaluation=EXAMPLES[:2], resume=True)
    assert files_of(tmp_path) == files_of(whole[0])


@pytest.mark.parametrize(
    "fields", [{"schedule": "wsd", "decay": 3}, {"schedule": "linear", "warmup": 2}, {"epochs": 5}]
)
def test_every_schedule_goes_on_to_the_same_bits(tmp_path, fields):
    fields |= {"steps": TrainConfig().steps} if "epochs" in fields else {}
    run(fresh(), tmp_path / "whole", save_every=1, keep_checkpoints=99, **fields)
    as_if_killed_after(4, tmp_path / "whole", tmp_path / "half")
    run(fresh(seed=8), tmp_path / "half", resume=True, **fields)
    assert files_of(tmp_path / "half") == files_of(tmp_path / "whole")


def test_an_adapter_in_another_dtype_is_refused_by_its_tensor(whole, tmp_path):
    as_if_killed_after(5, whole[0], tmp_path)
    model = fresh()
    for name in ("mid", "head"):
        layer = model.get_submodule(name)
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.bfloat16(), layer.lora_B.data.bfloat16()
    with pytest.raises(
        CheckpointError, match=r"checkpoint-5: .*lora_A\.weight is missing here or there, or of another shape"
    ):
        run(model, tmp_path, evaluation=EXAMPLES[:2], resume=True)


def test_the_same_examples_in_smaller_batches_are_the_same_run(whole, tmp_path):
    as_if_killed_after(5, whole[0], tmp_path)
    said, model = [], fresh(lora_dropout=0.2)
    run(model, tmp_path, evaluation=EXAMPLES[:2], resume=True, say=said, batch_size=1, accumulate=4)
    assert said[0] == "batch_size is 1, in the checkpoint 2: the same run, but its last bits may differ"
    assert "going on after step 5" in said[1]


def test_a_second_run_in_the_folder_is_refused_while_the_first_goes_on(whole, tmp_path):
    """Whatever it wants; and the first is none the worse for it."""
    refused = []

    def watch(record):
        for fields in ({}, {"resume": True}):
            with pytest.raises(CheckpointError, match=f"process {os.getpid()} is training there now") as caught:
                run(fresh(), tmp_path, **fields)
            refused.append(caught)

    run(fresh(), tmp_path, evaluation=EXAMPLES[:2], watch=watch)
    assert len(refused) > 9 and not (tmp_path / "run.lock").exists()
    assert files_of(tmp_path) == files_of(whole[0])


def test_resume_and_overwrite_together_mean_nothing(tmp_path):
    with pytest.raises(ConfigError, match="resume and overwrite are both set"):
        train(fresh(), EXAMPLES, TrainConfig(), tmp_path, PAD, resume=True, overwrite=True)


# ---- signals


def at_step(step, *numbers):
    def watch(record):
        if record["step"] == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return watch


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 143, "SIGTERM")])
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on(whole, tmp_path, number, code, name):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted) as caught:
        run(fresh(), tmp_path, watch=at_step(4, number))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    error = caught.value
    assert isinstance(error, MiniLoraError) and (error.exit_code, error.signal) == (code, number)
    assert str(error) == (
        f"{name} after step 4 of 9: saved in {tmp_path / 'checkpoint-4'}; go on with --resume (resume=True)"
    )
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4
    run(fresh(), tmp_path, resume=True)
    assert files_of(tmp_path) == files_of(whole[0])


def test_a_signal_before_the_first_step_saves_nothing_and_says_so(whole, tmp_path):
    with pytest.raises(Interrupted, match="after step 0 of 9: nothing was learnt yet, so nothing is saved"):
        run(fresh(), tmp_path, evaluation=EXAMPLES[:2], watch=at_step(0, signal.SIGTERM))
    run(fresh(), tmp_path, evaluation=EXAMPLES[:2], resume=True)
    assert files_of(tmp_path) == files_of(whole[0])


def test_a_signal_after_the_last_step_changes_nothing(whole, tmp_path):
    run(fresh(), tmp_path, watch=at_step(9, signal.SIGINT))
    assert files_of(tmp_path) == files_of(whole[0])


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_the_second_signal_ends_it_at_once(tmp_path, number, raised):
    reached = []

    def watch(record):
        at_step(2, number, number)(record)
        reached.append(record["step"])

    with pytest.raises(raised) as caught:
        run(fresh(), tmp_path, watch=watch)
    assert reached == [1] and not list(tmp_path.glob("checkpoint-*"))
    assert number == signal.SIGINT or caught.value.code == 143


def test_a_program_s_own_handler_stays(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        run(fresh(), tmp_path, watch=at_step(3, signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM] and (tmp_path / "adapter_model.safetensors").exists()


def test_a_run_outside_of_the_main_thread_is_a_run(whole, tmp_path):
    thread = threading.Thread(target=run, args=(fresh(), tmp_path))
    thread.start()
    thread.join()
    assert files_of(tmp_path) == files_of(whole[0])


# ---- no memory

CPU = "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
ERRORS = [RuntimeError(CPU), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=["cpu", "gpu", "python"])
@pytest.mark.parametrize("call", [1, 2], ids=["first micro-batch", "second"])
def test_a_step_without_memory_saves_the_one_before_and_says_what_to_do(whole, tmp_path, monkeypatch, error, call):
    calls, real = [], step_module.token_losses

    def losses(model, batch):
        calls.append(1)
        if len(calls) == 2 * 4 + call:
            raise error
        return real(model, batch)

    monkeypatch.setattr(step_module, "token_losses", losses)
    with pytest.raises(minilora.errors.OutOfMemory) as caught:
        run(fresh(), tmp_path)
    text = str(caught.value)
    assert text.startswith("step 5: no memory for batch_size=2 and up to 11 tokens (") and "\n" not in text
    assert f"saved in {tmp_path / 'checkpoint-4'}; go on with --resume and batch_size=1 with accumulate=4" in text
    assert "max_length" in text and caught.value.exit_code == 1
    monkeypatch.setattr(step_module, "token_losses", real)
    run(fresh(), tmp_path, resume=True)
    assert files_of(tmp_path) == files_of(whole[0])


def test_without_memory_in_an_evaluation_the_step_before_it_is_saved(whole, tmp_path, monkeypatch):
    def evaluate(model, *more):
        if steps:
            raise RuntimeError(CPU)
        return 1.0

    steps = []
    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(minilora.errors.OutOfMemory, match=r"saved in .*checkpoint-4"):
        run(fresh(), tmp_path, evaluation=EXAMPLES[:2], eval_every=4, watch=lambda r: r["step"] and steps.append(1))
    monkeypatch.undo()
    run(fresh(), tmp_path, evaluation=EXAMPLES[:2], resume=True)
    assert files_of(tmp_path) == files_of(whole[0])


def test_without_memory_in_the_middle_of_an_update_the_half_of_it_is_not_saved(whole, tmp_path, monkeypatch):
    step, calls = torch.optim.AdamW.step, []

    def half(self, *arguments):
        calls.append(1)
        if len(calls) == 6:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1)
            raise RuntimeError(CPU)
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(
        minilora.errors.OutOfMemory, match="broke while the weights changed, so checkpoint-4 is what is saved"
    ):
        run(fresh(), tmp_path, save_every=4)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    monkeypatch.undo()
    run(fresh(), tmp_path, resume=True)
    assert files_of(tmp_path) == files_of(whole[0])


def test_a_disk_that_is_full_ends_the_run_and_the_checkpoint_before_stays(whole, tmp_path, monkeypatch):
    write = minilora.files.disk.used.write

    def full(path, content):
        if "checkpoint-6" in str(path) and path.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, content)

    monkeypatch.setattr(minilora.files.disk.used, "write", full)
    with pytest.raises(WriteError, match=r"checkpoint-6.*cannot be written \(No space left on device\)"):
        run(fresh(), tmp_path, save_every=3)
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name] == ["checkpoint-3"]
    monkeypatch.undo()
    run(fresh(), tmp_path, resume=True)
    assert files_of(tmp_path) == files_of(whole[0])


def test_another_error_of_a_step_is_not_taken_for_that(tmp_path, monkeypatch):
    def losses(model, batch):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(step_module, "token_losses", losses)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(fresh(), tmp_path)


# ---- what is not finite


@pytest.fixture
def poisoned(monkeypatch):
    """``poisoned(steps, value)``: the loss of these steps (from 1) is multiplied by ``value``."""

    def poison(steps, value=float("nan")):
        now, losses, rate_of = [0], step_module.token_losses, loop.learning_rate

        def note(config, step):
            now[0] = step + 1
            return rate_of(config, step)

        def spoilt(model, batch):
            return losses(model, batch) * (value if now[0] in steps and torch.is_grad_enabled() else 1.0)

        monkeypatch.setattr(loop, "learning_rate", note)
        monkeypatch.setattr(step_module, "token_losses", spoilt)

    return poison


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_step_that_is_not_finite_is_skipped_and_said(tmp_path, poisoned, monkeypatch, value):
    # Two micro-batches a step: what the first one left must not be in the next step.
    poisoned({4}, value)
    model, weights = fresh(lora_dropout=0.0), {}

    def watch(record):
        weights[record["step"]] = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    records = run(model, tmp_path, watch=watch, save_every=2)
    assert [r["step"] for r in records] == list(range(1, 10))
    bad = records[3]
    assert set(bad) == {"step", "skipped", "seconds"}
    assert (
        bad["skipped"].startswith(f"the loss is {value} in micro-batch 1") and "every module returns" in bad["skipped"]
    )
    assert all(torch.equal(a, b) for a, b in zip(weights[3], weights[4], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[4], weights[5], strict=True))
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_after_some_in_a_row_it_stops_with_the_last_good_state_saved(tmp_path, poisoned):
    poisoned({3, 4, 6, 7, 8, 9})
    with pytest.raises(minilora.errors.TrainingError) as caught:
        run(fresh(), tmp_path, steps=12, max_skipped=3, save_every=4)
    text = str(caught.value)
    assert text.startswith("step 8: the loss is nan in micro-batch 1; ") and "3 steps in a row (max_skipped)" in text
    assert f"saved in {tmp_path / 'checkpoint-5'}; lower lr" in text and isinstance(caught.value, StateError)
    # Step 4 and 8 were skipped, so nothing was saved there.
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    minilora.load_adapter(Words(), tmp_path / "checkpoint-5")
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_a_run_with_skipped_steps_goes_on_to_the_same_bits(tmp_path, poisoned):
    poisoned({3, 6, 7})
    whole = run(fresh(), tmp_path / "whole", save_every=5)
    (tmp_path / "half").mkdir()
    as_if_killed_after(5, tmp_path / "whole", tmp_path / "half")
    again = run(fresh(), tmp_path / "half", resume=True)
    assert lasting(again) == lasting(whole) and files_of(tmp_path / "half") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["mid.lora_B", "head.lora_A"])
def test_the_first_gradient_that_is_not_finite_is_named(tmp_path, name):
    model = fresh()
    parameter = model.get_parameter(name)
    seen = []

    def grow(grad):
        seen.append(1)
        return grad * float("inf") if len(seen) in (5, 6) else grad  # of step 3

    parameter.register_hook(grow)
    records = run(model, tmp_path)
    assert [r["step"] for r in records if "skipped" in r] == [3]
    assert records[2]["skipped"].startswith(f"the gradient of {name} is not finite (loss ")


def test_a_module_that_returns_nan_is_named(tmp_path):
    model, calls = fresh(), []

    def break_once(module, inputs, output):
        calls.append(module.training)  # not while it is looked at before the first step
        return (
            output * float("nan") if module.training and sum(calls) in (7, 9) else output
        )  # step 4, and the look at it

    model.mid.register_forward_hook(break_once)
    records = run(model, tmp_path)
    assert records[3]["skipped"] == "the loss is nan in micro-batch 1; mid is the first to return NaN or infinity"


@pytest.mark.parametrize("save_every", [0, 2])
def test_weights_that_become_infinite_are_not_saved(tmp_path, monkeypatch, save_every):
    step, calls = torch.optim.AdamW.step, []

    def overflow(self, *arguments):
        step(self, *arguments)
        calls.append(1)
        if len(calls) == 5:
            with torch.no_grad():
                self.param_groups[0]["params"][1][0, 0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow)
    kept = "checkpoint-4" if save_every else "nothing"
    with pytest.raises(
        minilora.errors.TrainingError, match=f"step 5: a weight of the adapter .* so {kept} is what is saved"
    ):
        run(fresh(), tmp_path, save_every=save_every)
    assert max([0, *(int(path.name[11:]) for path in tmp_path.glob("checkpoint-*"))]) == (4 if save_every else 0)


def test_a_norm_that_overflows_is_skipped(tmp_path):
    model = fresh()
    model.get_parameter("mid.lora_B").register_hook(lambda grad: grad * 1e30 if model.late else grad)
    model.late = False

    def watch(record):
        model.late = record["step"] == 2

    records = run(model, tmp_path, watch=watch, lr=1e-6)
    assert "the gradients are finite, their norm overflows" in records[2]["skipped"]


def test_the_settings_of_a_checkpoint_are_all_named_somewhere():
    """A field that is added to the config is either part of what makes a run, or said here to change none of its bits."""
    no_matter = {"eval_every", "save_every", "keep_checkpoints", "max_skipped", "profile", "offload"}
    compared = {*SCHEDULE, "epochs", "batch_size", "accumulate", "gradient_checkpointing", "pack"}
    assert {field.name for field in dataclasses.fields(TrainConfig)} == no_matter | compared


# ---- killed


def killed(folder, first, stride):
    """What ``training_kills.py`` says: its first line as three numbers, and the rest."""
    script = Path(__file__).with_name("training_kills.py")
    command = [sys.executable, "-W", "ignore", str(script), str(folder), str(first), str(stride)]
    paths = os.pathsep.join([str(Path(minilora.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    line, _, failed = done.stdout.partition("\n")
    return [int(word) for word in re.findall(r"\d+", line)], failed.strip() + done.stderr


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


@needs_fork
def test_a_run_that_is_killed_goes_on_by_itself_to_the_same_bits(tmp_path):
    (points, tried, failed), said = killed(tmp_path, 11, 17)
    assert points >= 100 and tried >= 6 and not failed, said


@needs_fork
@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_goes_on_by_itself_to_the_same_bits(tmp_path):
    (points, tried, failed), said = killed(tmp_path, 1, 1)
    assert tried == points >= 100 and not failed, said


def test_the_state_lands_where_the_parameters_are(tmp_path):
    """On "meta", for want of a GPU: weights are copied into their place, moments follow their parameter."""
    from minilora.training.checkpoint import read_checkpoint
    from minilora.training.guards import check_parameters
    from minilora.training.resume import restore

    run(fresh(), tmp_path, save_every=4)
    found = read_checkpoint(tmp_path / "checkpoint-8", 8)
    model = fresh().to("meta")
    named = check_parameters(model)
    optimizer = torch.optim.AdamW(list(named.values()))
    restore(model, "default", named, optimizer, found, found.meaning, print)
    moments = {key: value for state in optimizer.state.values() for key, value in state.items() if key != "step"}
    assert moments.keys() == {"exp_avg", "exp_avg_sq"}
    for parameter, state in optimizer.state.items():
        assert {state[key].device for key in moments} == {parameter.device} == {torch.device("meta")}
        assert (state["exp_avg"].shape, float(state["step"])) == (parameter.shape, 8.0)

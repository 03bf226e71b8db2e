"""The folder of a sweep: what lies in its way, what it is gone on with, and what is left of it when a file is lost or the disk is full."""

import json

import pytest
import torch

from minilora import LoraConfig
from minilora.data.encoding import Encoded
from minilora.errors import CheckpointError, ConfigError, WriteError
from minilora.lab import Trial, sweep, trials_of
from minilora.lab.sweeps import folder as folder_file
from minilora.training.settings import TrainConfig
from tests import models

EXAMPLES = [Encoded(tuple(range(2 + at, 12 + at)), tuple(range(2 + at, 12 + at))) for at in range(9)]


def base(**changed):
    model = models.llama(0, attention_bias=True).requires_grad_(False)
    with torch.no_grad():
        for name, value in changed.items():
            model.get_submodule(name.replace("__", ".")).weight.add_(value)
    return model


def trials(**fields):
    lora = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])
    plan = TrainConfig(**{"steps": 3, "lr": 5e-3, "batch_size": 3, "pack": "off"} | fields)
    return [Trial(lora, plan), Trial(lora, plan, "dora")]


def run(folder, model=None, asked=None, **options):
    return sweep(model or base(), EXAMPLES, asked or trials(), folder=folder, say=lambda line: None, **options)


@pytest.mark.parametrize(
    ("changed", "options", "words"),
    [
        ({"model__embed_tokens": 0.01}, {}, "base model"),
        ({"model__norm": 0.5}, {}, "base model"),
        ({}, {"measured_on": "other"}, "settings"),
        ({}, {"start_examples": 5}, "settings"),
        ({}, {"tokens_at_once": 77}, "settings"),
        ({}, {"together": False}, "settings"),
    ],
)
def test_it_is_gone_on_with_as_it_began(changed, options, words, tmp_path):
    run(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=f"a sweep of other {words}"):
        run(tmp_path / "out", base(**changed), resume=True, **options)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    run(tmp_path / "out", resume=True)


def test_what_no_sweep_has_left_is_not_written_over(tmp_path):
    own = tmp_path / "out" / "t1" / "adapter_model.safetensors"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    for options in ({}, {"overwrite": True}):
        with pytest.raises(CheckpointError, match=r"t1: lies there already, and no sweep has left it"):
            run(tmp_path / "out", **options)
    assert own.read_bytes() == b"mine" and not (tmp_path / "out" / "sweep.json").exists()


def test_a_damaged_sweep_is_begun_anew(tmp_path):
    first = run(tmp_path / "out")
    (tmp_path / "out" / "sweep.json").write_text('{"trials":')
    with pytest.raises(CheckpointError, match="damaged"):
        run(tmp_path / "out", resume=True)
    again = run(tmp_path / "out", overwrite=True)
    assert all(
        torch.equal(a.weights[key], b.weights[key]) for a, b in zip(first, again, strict=True) for key in a.weights
    )


@pytest.mark.parametrize(
    "content", [{}, {"trials": 3, "steps": 1}, {"trials": {"t1": {}}, "steps": 3}, {"trials": {"x": {}}, "steps": 3}]
)
def test_a_damaged_state_is_named(content, tmp_path):
    run(tmp_path / "out")
    path = tmp_path / "out" / "state.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(content and kept | content))
    with pytest.raises(CheckpointError, match=r"state.json: damaged"):
        run(tmp_path / "out", resume=True)


@pytest.mark.parametrize("together", [True, False])
def test_a_disk_that_is_full_at_the_end_loses_nothing(together, tmp_path, monkeypatch):
    wanted, write = run(tmp_path / "whole", together=together), folder_file.write_files

    def full(path, files):
        if path.name == "t1":
            raise WriteError(f"{path}: no space")
        write(path, files)

    with monkeypatch.context() as patch:
        patch.setattr(folder_file, "write_files", full)
        with pytest.raises(WriteError, match="t1: no space"):
            run(tmp_path / "out", together=together)
    assert not together or (tmp_path / "out" / "t2" / "adapter_model.safetensors").exists()
    found = run(tmp_path / "out", together=together, resume=True)
    for one, other in zip(found, wanted, strict=True):
        assert one.finished and one.losses == other.losses
        assert all(torch.equal(one.weights[key], other.weights[key]) for key in other.weights)


def test_a_training_run_is_no_sweep(tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("job.json", "log.jsonl"):
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(CheckpointError, match="holds a run of minilora train"):
        run(tmp_path / "out")


def test_dropout_of_a_head_that_is_not_there_separates_nobody():
    model = models.gpt2(0, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0).requires_grad_(False)
    asked = [
        Trial(LoraConfig(r=3, lora_alpha=7, target_modules=["c_attn"]), TrainConfig(steps=1, batch_size=2))
        for _ in "ab"
    ]
    assert [one.alone for one in sweep(model, EXAMPLES, asked, say=lambda line: None)] == ["", ""]


def test_a_grid_names_lists_and_refuses_dictionaries():
    (one,) = trials_of("modules_to_save=lm_head+norm layers_to_transform=0+2 layers_pattern=layers")
    assert list(one.lora.modules_to_save) == ["lm_head", "norm"] and list(one.lora.layers_to_transform) == [0, 2]
    (none,) = trials_of("modules_to_save=none")
    assert none.lora.modules_to_save is None
    with pytest.raises(ConfigError, match="rank_pattern holds keys and values, which a grid cannot write"):
        trials_of("rank_pattern=q_proj")
    with pytest.raises(ConfigError, match=r"known are full, .*dora, .*vera"):
        trials_of("variant=foo")

"""What nothing would show: another packing under the same name, weights of the data, a card of another step, twins of held-out data."""

import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from minilora.cli import main
from minilora.errors import CheckpointError, ConfigError
from minilora.job.card import card_files
from minilora.job.compare import compare
from minilora.job.finetune import fine_tune
from minilora.job.given import job_from
from minilora.job.record import read_record, write_record
from minilora.training.settings import TrainConfig


def quiet(line):
    pass


@pytest.fixture(scope="module")
def run(make_job, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    fine_tune(make_job(out, steps=4, training={"save_every": 2}), quiet)
    return out


def test_export_packs_a_base_that_is_named_as_the_run_did(make_job, tmp_path, capsys):
    job = make_job(tmp_path / "out", prompts=())
    fine_tune(replace(job, lora=replace(job.lora, init_lora_weights="olora")), quiet)
    words = ["export", "--adapter", str(tmp_path / "out"), "--for", "vllm"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    assert main([*words, "--out", str(tmp_path / "b"), "--model", job.model]) == 0
    a, b = (safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_other_levels_under_the_same_name_are_said(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    record = read_record(tmp_path / "run")
    assert record.packing.levels and record.packing.blocksize == 64
    write_record(tmp_path / "run", replace(record, packing=replace(record.packing, levels="0" * 64)))
    assert main(["generate", "--adapter", str(tmp_path / "run"), "What?"]) == 0
    assert "the levels of nf4 are others here" in capsys.readouterr().err


def test_a_base_that_was_packed_anew_is_said(make_job, model_folder, tmp_path, capsys):
    packed = str(tmp_path / "packed")
    assert main(["quantize", "--model", model_folder, "--out", packed]) == 0
    fine_tune(make_job(tmp_path / "out", model=packed, prompts=()), quiet)
    shutil.rmtree(packed)
    assert main(["quantize", "--model", model_folder, "--out", packed, "--scale", "mse"]) == 0
    capsys.readouterr()
    assert main(["generate", "--adapter", str(tmp_path / "out"), "What?"]) == 0
    assert "the base holds other packed weights than it did" in capsys.readouterr().err


def test_weights_and_purposes_of_the_data_are_remembered(make_job, tmp_path):
    job = make_job(tmp_path / "a", prompts=())
    fine_tune(job, quiet)
    said = []
    fine_tune(replace(job, out=str(tmp_path / "b"), data=[f"{job.data}:0.5"], eval_data=job.data), said.append)
    assert [(file.weight, file.purpose) for file in read_record(tmp_path / "b").data] == [
        (0.5, "learn"),
        (1.0, "evaluate"),
    ]
    (told,) = [line for line in said if "learnt from as well" in line]
    assert told.startswith("4 of 9 examples to evaluate on"), told
    assert " x 0.5" in compare([tmp_path / "a", tmp_path / "b"]).settings["data"][1]


def test_a_name_that_is_no_utf_8_is_remembered(make_job, tmp_path):
    job = make_job(tmp_path / "out", prompts=())
    odd = tmp_path / "d\udcff.jsonl"
    shutil.copy(job.data, odd)
    fine_tune(replace(job, data=str(odd)), quiet)
    assert read_record(tmp_path / "out").data[0].path == str(odd)
    with pytest.raises(ConfigError, match="UTF-8"):
        replace(job, prompts=("a\udcff",))


def test_no_card_of_a_run_that_broke_off(run, tmp_path):
    assert card_files(run, "me/it")["README.md"]
    shutil.copytree(run, tmp_path / "run")
    record = read_record(tmp_path / "run")
    *earlier, last = record.sessions
    going = replace(record, sessions=(*earlier, last, replace(last, start=4, stop=None)))
    write_record(tmp_path / "run", going)
    with pytest.raises(CheckpointError, match="its run has not ended"):
        card_files(tmp_path / "run", "me/it")


def test_a_run_is_not_written_over_the_adapter_that_it_begins_with(run, make_job, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    before = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    for start in ("run", "run/checkpoint-2"):
        with pytest.raises(ConfigError, match="where this run is written"):
            fine_tune(make_job(tmp_path / "run", init_from=str(tmp_path / start), overwrite=True), quiet)
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == before


def test_columns_that_no_line_has_are_refused(make_job, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"question": f"How {n}?", "answer": "So."}) + "\n" for n in range(4)))
    with pytest.raises(ConfigError, match="columns: no line has frage and antwort"):
        fine_tune(make_job(tmp_path / "out", data=str(file), columns=("prompt=frage", "completion=antwort")), quiet)


def test_what_made_the_data_others_is_named(run, make_job, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    job = make_job(tmp_path / "run", steps=4, resume=True, training={"save_every": 2})
    with pytest.raises(CheckpointError, match=r"--eval-share was 0\.1 and is 0\.3"):
        fine_tune(replace(job, eval_share=0.3), quiet)


def test_a_longer_run_may_have_another_warm_up(run, make_job, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    training = {"save_every": 2, "warmup": 1}
    outcome = fine_tune(make_job(tmp_path / "run", steps=7, resume=True, training=training), quiet)
    assert len(outcome.losses) == 7


def test_steps_beside_epochs_of_a_whole_config_are_refused():
    with pytest.raises(ConfigError, match="steps and epochs both"):
        job_from({"model": "m", "data": "d", "out": "o", "steps": 60, "training": TrainConfig(epochs=0.5)})


def test_paths_are_taken_wherever_a_file_is_named(tmp_path):
    job = job_from({"model": "m", "data": [tmp_path / "a"], "eval_data": tmp_path / "b", "out": tmp_path})
    assert (job.data, job.eval_data, job.out) == ([str(tmp_path / "a")], str(tmp_path / "b"), str(tmp_path))


def test_a_dry_run_of_a_run_that_lies_there_is_refused(make_job, tmp_path):
    with pytest.raises(ConfigError, match="dry_run"):
        make_job(tmp_path, dry_run=True, resume=True)

"""A job from settings by name: each field finds its config, and ``fine_tune`` takes the flags of the command as keywords."""

import dataclasses
import json
from pathlib import Path

import pytest

import minilora
from minilora import Job, LoraConfig, fine_tune
from minilora.cli import make_parser, train
from minilora.errors import ConfigError
from minilora.job.given import job_from
from minilora.training.settings import TrainConfig

BASIC = {"model": "m", "data": "d.jsonl", "out": "o"}


def test_the_names_are_public():
    assert minilora.fine_tune is fine_tune and minilora.Job is Job


def test_a_setting_finds_its_place():
    job = job_from({**BASIC, "r": 3, "lora_alpha": 12, "steps": 7, "lr": 0.01, "quant": "none", "prompts": ["a"]})
    assert (job.lora.r, job.lora.lora_alpha, job.training.steps, job.training.lr) == (3, 12, 7, 0.01)
    assert (job.model, job.quant, job.prompts) == ("m", "none", ["a"])
    assert job.lora.target_modules == "all-linear" and job.lora.task_type == "CAUSAL_LM"


def test_the_keywords_are_the_flags():
    for name, flag in train.settings().items():
        if flag.default is not None and name != "target_modules" and name not in BASIC:
            assert isinstance(job_from({**BASIC, name: flag.default}), Job), name


def test_a_call_and_a_command_are_one_job():
    words = [
        "train",
        "--model",
        "m",
        "--data",
        "d.jsonl",
        "--out",
        "o",
        "--r",
        "3",
        "--lora-alpha",
        "12",
        "--steps",
        "7",
    ]
    assert train.job_of(make_parser().parse_args(words)) == job_from({**BASIC, "r": 3, "lora_alpha": 12, "steps": 7})


def test_whole_configs_and_single_fields_of_them():
    lora, training = LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj"]), TrainConfig(steps=7, lr=0.01)
    job = job_from({**BASIC, "lora": lora, "training": training, "r": 5, "lr": 0.02})
    assert job.lora == dataclasses.replace(lora, r=5) and job.training == TrainConfig(steps=7, lr=0.02)
    assert job_from({**BASIC, "lora": lora, "training": training}) == Job(**BASIC, lora=lora, training=training)


def test_paths_may_be_paths():
    job = job_from({"model": Path("m"), "data": Path("d.jsonl"), "out": Path("o")})
    assert (job.model, job.data, job.out) == ("m", "d.jsonl", "o")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "m", "data": "d"}, "out is missing; give out=..."),
        ({**BASIC, "stepz": 3}, "stepz: no setting of a job; the closest are 'steps'"),
        ({**BASIC, "r": 0}, "r=0: wanted a whole number"),
        ({**BASIC, "steps": 0}, "steps=0: wanted a whole number"),
        ({**BASIC, "lora": 3}, "lora=3: wanted a LoraConfig"),
        ({**BASIC, "lora": {"r": 3}, "r": 4}, "lora={'r': 3}: wanted a LoraConfig"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(given, message):
    with pytest.raises(ConfigError) as caught:
        fine_tune(**given)
    assert str(caught.value).startswith(message)


def test_a_job_and_a_setting_beside_it_are_refused():
    with pytest.raises(ConfigError, match="steps=: stands beside a job"):
        fine_tune(Job(**BASIC), steps=3)


def test_the_call_trains_and_shows_its_progress(model_folder, tmp_path, capsys):
    data, out = tmp_path / "d.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps({"prompt": p, "completion": "yo"}) + "\n" for p in ("hi", "who?", "so?")))
    outcome = fine_tune(
        model=model_folder, data=data, out=out, r=3, lora_alpha=12, steps=2, prompts=["hi"], eval_share=0, max_length=64
    )
    assert outcome.folder == out and len(outcome.losses) == 2 and outcome.answers[0]["prompt"] == "hi"
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 3
    said = capsys.readouterr().out
    assert "3 to learn from" in said and "step 2/2  loss " in said


def test_who_listens_is_told_and_nothing_is_printed(model_folder, tmp_path, capsys):
    data, lines, records = tmp_path / "d.jsonl", [], []
    data.write_text('{"prompt": "hi", "completion": "yo"}\n')
    settings = {"data": data, "out": tmp_path / "run", "steps": 1, "eval_share": 0}
    fine_tune(model=model_folder, say=lines.append, watch=records.append, **settings)
    assert lines and [record["step"] for record in records] == [1] and capsys.readouterr().out == ""

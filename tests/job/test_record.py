"""What a run folder remembers of its job: written before the first step, whole through interruptions, and never believed blindly."""

import copy
import hashlib
import json
import time

import pytest

from minilora.errors import CheckpointError
from minilora.job.finetune import fine_tune
from minilora.job.record import RECORD_FILE, read_record, write_record
from minilora.store.fingerprint import is_fingerprint


@pytest.fixture(scope="module")
def run(make_job, tmp_path_factory):
    """The job and the outcome of one that was run; nobody may change its folder."""
    asked = make_job(tmp_path_factory.mktemp("run") / "out")
    return asked, fine_tune(asked, lambda line: None)


def test_it_says_all_that_asking_again_needs(run, model_folder):
    record = read_record(run[0].out)
    assert (record.model, record.device, record.dtype, record.attention) == (model_folder, "cpu", "float32", "auto")
    assert str(record.packing) == "packed to nf4, double quantization" and not record.packing.by_folder
    assert is_fingerprint(dict(record.fingerprint)) and record.fingerprint["samples"]
    assert (record.system, record.date) == ("", "") and len(record.template) == 64
    assert record.versions.keys() == {"minilora", "torch", "transformers", "python"}


def test_it_knows_the_data_and_every_setting_by_its_flag(run):
    from minilora.cli.train import settings

    asked, _ = run
    record = read_record(asked.out)
    (file,) = record.data
    with open(asked.data, "rb") as data:
        assert (file.path, file.sha256, file.weight) == (asked.data, hashlib.sha256(data.read()).hexdigest(), 1.0)
    assert settings().keys() - {"resume", "overwrite"} <= record.settings.keys()
    assert record.settings["lora_alpha"] == 7 and record.settings["steps"] == 3 and record.settings["seed"] == 5
    assert record.settings["prompts"] == ["What?", "Who are you?"]


def test_it_has_the_answers_and_the_time_of_the_outcome(run):
    asked, outcome = run
    record = read_record(asked.out)
    assert list(record.answers) == outcome.answers and record.answers[0].keys() == {"prompt", "before", "after"}
    assert record.seconds == outcome.seconds and record.peak_mb == outcome.peaks_mb
    (session,) = record.sessions
    assert (session.start, session.stop) == (0, 3)
    assert session.seconds.keys() == {"load", "inject", "answers before", "train", "answers after"}


def test_it_is_there_before_the_first_step(make_job, tmp_path):
    seen = []

    def watch(line):
        seen.append((line["step"], read_record(tmp_path / "out")))

    fine_tune(make_job(tmp_path / "out"), lambda line: None, watch)
    first = seen[0][1]
    assert first.sessions[0].stop is None and "after" not in first.answers[0]
    assert first.prompts == ["What?", "Who are you?"]


def test_a_checkpoint_in_the_run_has_the_record_of_the_run(run):
    asked, _ = run
    assert read_record(f"{asked.out}/checkpoint-3") == read_record(asked.out)


def test_another_folder_has_none(tmp_path):
    assert read_record(tmp_path) is None and read_record(tmp_path / "nothing") is None


def test_it_comes_back_as_it_went(run, tmp_path):
    record = read_record(run[0].out)
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record


# ---- files that no run wrote

WRONG = {
    "a list": lambda content: [content],
    "another version": lambda content: content | {"version": 2},
    "true for a version": lambda content: content | {"version": True},
    "a key that is missing": lambda content: {key: content[key] for key in content if key != "system"},
    "a key more": lambda content: content | {"run": "rm -rf /"},
    "no model": lambda content: content | {"model": ""},
    "no fingerprint": lambda content: content | {"fingerprint": {}},
    "packing": lambda content: content | {"packing": "nf4"},
    "a format that is no word": lambda content: content | {"packing": content["packing"] | {"quant": "nf4; ls"}},
    "packing with a number": lambda content: content | {"packing": content["packing"] | {"double_quant": 1}},
    "a device": lambda content: content | {"device": "cuda:x"},
    "auto for a dtype": lambda content: content | {"dtype": "auto"},
    "an attention of a hub": lambda content: content | {"attention": "someone/kernel"},
    "a system turn that is none": lambda content: content | {"system": None},
    "a date": lambda content: content | {"date": "tomorrow"},
    "a template": lambda content: content | {"template": "{{ x }}"},
    "data": lambda content: content | {"data": [{"path": "a", "sha256": "0", "weight": 1}]},
    "settings": lambda content: content | {"settings": []},
    "tokens": lambda content: content | {"settings": content["settings"] | {"max_new_tokens": "all"}},
    "versions": lambda content: content | {"versions": {"torch": 2}},
    "a session": lambda content: content | {"sessions": [{}]},
    "a time": lambda content: content | {"sessions": [content["sessions"][0] | {"seconds": {"train": float("nan")}}]},
    "memory": lambda content: content | {"sessions": [content["sessions"][0] | {"peak_mb": {"train": -1}}]},
    "an answer": lambda content: content | {"answers": [{"prompt": "x"}]},
    "an answer of numbers": lambda content: content | {"answers": [{"prompt": "x", "before": 1}]},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_no_run_wrote_is_refused(run, tmp_path, wrong):
    with open(f"{run[0].out}/{RECORD_FILE}", encoding="utf-8") as file:
        content = WRONG[wrong](copy.deepcopy(json.load(file)))
    (tmp_path / RECORD_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"job\.json: damaged, or of a newer minilora \(.+\); copy"):
        read_record(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b'{"version": 1, "version": 1}', b"[" * 100_000])
def test_what_is_no_json_is_refused(tmp_path, raw):
    (tmp_path / RECORD_FILE).write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        read_record(tmp_path)


def test_a_huge_file_is_not_read(tmp_path):
    with open(tmp_path / RECORD_FILE, "wb") as file:
        file.truncate(50_000_000_000)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match="at most"):
        read_record(tmp_path)
    assert time.monotonic() - begin < 1


def test_a_folder_of_that_name_is_refused(tmp_path):
    (tmp_path / RECORD_FILE).mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_record(tmp_path)

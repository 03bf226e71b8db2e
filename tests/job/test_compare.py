"""Runs side by side: the settings that differ and no others, losses, answers to the same prompts, and the page."""

import json
import shutil

import pytest

from minilora.cli import main
from minilora.errors import CheckpointError, ConfigError
from minilora.job.compare import compare
from minilora.job.finetune import fine_tune
from minilora.lora.config import LoraConfig
from tests.job.asked import SYSTEM


@pytest.fixture(scope="module")
def runs(make_job, tmp_path_factory):
    """Two runs that differ in rank, steps, packing and system turn: ``(folders, outcomes)``."""
    place = tmp_path_factory.mktemp("runs")
    lora = LoraConfig(r=5, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM")
    jobs = [
        make_job(place / "one", steps=3, eval_share=0.2),
        make_job(
            place / "two", steps=4, eval_share=0.2, lora=lora, quant="none", system=SYSTEM, prompts=("What?", "Else?")
        ),
    ]
    outcomes = [fine_tune(job, lambda line: None) for job in jobs]
    return [place / "one", place / "two"], outcomes


@pytest.fixture
def copies(runs, tmp_path):
    """``copies(n)``: the first run n times over."""

    def make(count):
        places = [tmp_path / f"copy-{number}" for number in range(count)]
        for place in places:
            shutil.copytree(runs[0][0], place)
        return places

    return make


def test_what_differs_is_told_and_nothing_else(runs):
    found = compare(runs[0])
    assert found.names == ["one", "two"] and found.notes == []
    assert found.settings["r"] == ["3", "5"] and found.settings["steps"] == ["3", "4"]
    assert found.settings["packing"] == ["packed to nf4, double quantization", "not packed"]
    assert found.settings["system"] == ["none", SYSTEM]
    assert not {"lora_alpha", "lr", "model", "data", "out", "prompts", "version of torch", "max_new_tokens"} & set(
        found.settings
    )


def test_runs_of_one_job_differ_in_nothing(copies):
    found = compare(copies(3))
    assert found.settings == {} and len(found.names) == 3
    assert all(len(set(texts)) == 1 for texts in found.results.values())


def test_other_data_of_the_same_name_differ(copies):
    one, two = copies(2)
    record = json.loads((two / "job.json").read_text())
    record["data"][0]["sha256"] = "0" * 64
    (two / "job.json").write_text(json.dumps(record))
    (texts,) = compare([one, two]).settings.values()
    assert texts[1] == "d.jsonl (00000000)" != texts[0] and texts[0].startswith("d.jsonl (")


def test_results_are_those_of_the_runs(runs):
    found, (one, two) = compare(runs[0]), runs[1]
    rows = found.results
    assert rows["steps"] == ["3", "4"]
    assert rows["training loss, first"] == [f"{run.losses[0]:.3f}" for run in (one, two)]
    assert rows["training loss, last"] == [f"{run.losses[-1]:.3f}" for run in (one, two)]
    held = [[r["eval_loss"] for r in run.records if "eval_loss" in r] for run in (one, two)]
    assert rows["held-out loss, last"] == [f"{values[-1]:.3f}" for values in held]
    assert rows["held-out loss, least"] == [f"{min(values):.3f}" for values in held]
    assert rows["all of it, s"] == [f"{sum(run.seconds.values()):.0f}" for run in (one, two)]
    assert all("B" in text for text in [*rows["adapter"], *rows["peak memory"]])


def test_answers_to_the_same_prompts(runs, copies):
    found, (one, two) = compare(runs[0]), runs[1]
    assert list(found.answers) == ["What?"]  # the other prompts were asked of one run alone
    said = found.answers["What?"]
    assert {name: said[name] for name in ("one", "two")} == {
        name: run.answers[0]["after"] for name, run in (("one", one), ("two", two))
    }
    same = compare(copies(2)).answers["What?"]
    assert same["before training"] == one.answers[0]["before"]


def test_a_run_without_a_record_has_its_log(copies):
    one, two = copies(2)
    (two / "job.json").unlink()
    found = compare([one, two])
    assert found.notes == [f"no job.json, so no settings and no answers: {two}"] and found.answers == {}
    assert found.results["training loss, last"][0] == found.results["training loss, last"][1]


def test_names_tell_the_folders_apart(copies, tmp_path, runs):
    places = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for place in places:
        shutil.copytree(runs[0][0], place)
    assert compare(places).names == ["a/run", "b/run"]
    assert len(set(compare([places[0], places[0]]).names)) == 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda place: (place / "log.jsonl").unlink(), "no run lies there"),
        (lambda place: (place / "log.jsonl").write_text('{"step": 0, "eval_loss": 1.0}\n'), "has no step yet"),
        (lambda place: (place / "job.json").write_text("{"), "job.json: damaged"),
    ],
)
def test_what_is_no_run_is_refused(copies, damage, message):
    one, two = copies(2)
    damage(two)
    with pytest.raises(CheckpointError, match=message) as caught:
        compare([one, two])
    assert str(two) in str(caught.value)


def test_one_run_is_nothing_to_compare(copies):
    with pytest.raises(ConfigError, match="wanted at least two"):
        compare(copies(1))


# ---- the command


def test_the_command_prints_it(runs, capsys):
    folders, outcomes = runs
    assert main(["compare", *map(str, folders)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0].split() == ["one", "two"] and "\nsettings that differ\n" in said
    assert "> What?" in said
    last = [f"{run.losses[-1]:.3f}" for run in outcomes]
    assert [line.split()[-2:] for line in said.splitlines() if line.startswith("training loss, last")] == [last]
    assert max(map(len, said.partition("> What?")[0].splitlines())) < 140


def test_the_page_has_the_curves_of_all_in_one_figure(runs, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    folders, outcomes = runs
    assert main(["compare", *map(str, folders), "--html", str(tmp_path / "deep" / "c.html")]) == 0
    page = (tmp_path / "deep" / "c.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2  # of a wide page and of a phone
    for text in ("one, held out", "two, held out", "Settings that differ", "What?", f"{outcomes[1].losses[-1]:.3f}"):
        assert text in page
    assert capsys.readouterr().out.endswith("c.html: open it in a browser\n")


def test_the_page_escapes_what_a_model_says(copies, tmp_path, capsys):
    one, two = copies(2)
    record = json.loads((two / "job.json").read_text())
    record["answers"][0]["after"] = "<script>alert(1)</script>"
    (two / "job.json").write_text(json.dumps(record))
    assert main(["compare", str(one), str(two), "--html", str(tmp_path / "c.html")]) == 0
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_a_page_that_cannot_be_written_is_refused_first(runs, capsys, tmp_path):
    assert main(["compare", *map(str, runs[0]), "--html", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "wanted a file" in said.err

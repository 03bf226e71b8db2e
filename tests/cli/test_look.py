"""``minilora look`` and the section of a run's report: what is shown is what is trained on, and looking changes nothing."""

import contextlib
import json
import re
import shutil
import sys

import pytest

from minilora.cli import main
from minilora.data.records import read
from minilora.errors import DataError
from minilora.job import lens
from minilora.job.finetune import fine_tune
from minilora.job.lens import chosen, lenses_of
from minilora.job.look import pick

pytest.importorskip("transformers")
ADAPTER = "adapter_model.safetensors"
TALKS = {"hi": "yo", "1 < 2?": "true", "who are you?": "me", "where?": "here", "when?": "now"}


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "talks.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in TALKS.items()))
    return str(path)


@pytest.fixture(scope="module")
def settings(model_folder, data_file):
    own = {
        "model": model_folder,
        "data": data_file,
        "steps": 4,
        "batch_size": 2,
        "lr": 0.02,
        "max_length": 64,
        "seed": 3,
    }
    return own | {
        "eval_share": 0.4,
        "r": 3,
        "lora_alpha": 7,
        "lora_dropout": 0.1,
        "system": "be brief",
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return out, fine_tune(**settings, out=out, save_every=2, say=lambda line: None)


def look(capsys, *flags):
    code = main(["look", "--device", "cpu", *map(str, flags)])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out, said.err


def losses(text):
    """``{place: (mean before, mean after)}`` of what was printed, or of a page."""
    found = re.findall(r"jsonl:(\d+), [\w ]+: [\d,]+ tokens, \d+ count; their loss ([\d.]+)(?: → ([\d.]+))?", text)
    return {int(line): (float(before), float(after) if after else None) for line, before, after in found}


def sections(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


# ---- the report of a run


def test_the_report_shows_examples_that_were_learnt_from_and_held_out(run):
    out, outcome = run
    page = (out / "report.html").read_text()
    assert "What it learnt from" in sections(page)
    assert page.count("learnt from: ") == 2 and page.count("held out: ") == 2
    shown = losses(page.replace("&#x27;", "'"))
    assert len(shown) == 4
    held = [shown[int(line)] for line in re.findall(r"jsonl:(\d+), held out", page)]
    evaluated = [record["eval_loss"] for record in outcome.records if "eval_loss" in record]
    counts = [int(count) for count in re.findall(r"held out: [\d,]+ tokens, (\d+) count", page)]
    for place, loss in (
        (0, evaluated[0]),
        (1, evaluated[-1]),
    ):  # the two that were held out are all that were evaluated on
        mean = sum(means[place] * count for means, count in zip(held, counts, strict=True)) / sum(counts)
        assert mean == pytest.approx(loss, abs=0.006)  # two digits are shown


def test_it_changes_no_bit_of_the_run(run, settings, tmp_path, monkeypatch):
    out, _ = run
    monkeypatch.setattr(lens.Shown, "ask", lambda *_: None)
    fine_tune(**settings, out=tmp_path / "other", save_every=2, say=lambda line: None)
    assert (out / ADAPTER).read_bytes() == (tmp_path / "other" / ADAPTER).read_bytes()
    one, other = (
        [
            {key: json.loads(line).get(key) for key in ("step", "loss", "grad_norm", "eval_loss")}
            for line in text.splitlines()
        ]
        for text in ((place / "log.jsonl").read_text() for place in (out, tmp_path / "other"))
    )
    assert one == other and len(one) > 4
    assert losses((tmp_path / "other" / "report.html").read_text()) == {}


@pytest.mark.parametrize("start", [{}, {"init_lora_weights": "pissa", "quant": "none"}])
def test_a_run_that_goes_on_has_the_losses_of_its_first_step(settings, tmp_path, start):
    given = settings | start | {"say": lambda line: None}
    fine_tune(**given, out=tmp_path / "a", save_every=2)
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    fine_tune(**given, out=tmp_path / "b", resume=True)
    whole, half = (losses((tmp_path / name / "report.html").read_text()) for name in "ab")
    assert whole and half == whole


def test_a_file_that_is_another_one_by_now_costs_the_roles_and_no_run(settings, tmp_path, monkeypatch):
    data = tmp_path / "d.jsonl"
    shutil.copy(settings["data"], data)
    real = lens.Shown.pictured

    def changed(self, *rest):
        data.write_text('{"prompt": "another", "completion": "one"}\n')
        return real(self, *rest)

    monkeypatch.setattr(lens.Shown, "pictured", changed)
    fine_tune(**settings | {"data": str(data)}, out=tmp_path / "run", say=lambda line: None)
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("its line cannot be read again") == 4 and len(losses(page)) == 4


# ---- the command


def test_of_a_run_it_shows_what_the_report_showed(capsys, run, tmp_path):
    out, _ = run
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    printed, beside = look(capsys, "--adapter", out, "--held", "--out", tmp_path / "deep" / "lens.html")
    page = losses((out / "report.html").read_text())
    shown = losses(printed)
    assert len(shown) == 2 and all(shown[line] == pytest.approx(page[line], abs=0.011) for line in shown)
    assert losses((tmp_path / "deep" / "lens.html").read_text()) == shown
    assert "not the data" not in beside
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_it_shows_words_by_role_and_the_tokens_that_are_hard(capsys, model_folder, data_file):
    printed, _ = look(capsys, "--model", model_folder, "--data", data_file, "--examples", "2", "--eval-share", "0")
    lines = printed.splitlines()
    assert lines[0].startswith(f"{data_file}:1, learnt from: ") and "→" not in lines[0]
    assert re.fullmatch(r"  user +read +hi", lines[2]) and re.fullmatch(
        r"  assistant +counts +yo<\|im_end\|>", lines[4]
    )
    assert re.match(r"  highest loss: \S+ \d+\.\d\d, ", lines[6])
    assert len(re.findall("highest loss", printed)) == 2


def test_without_losses_no_weight_is_read(capsys, model_folder, data_file, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    printed, _ = look(capsys, "--model", bare, "--data", data_file, "--no-losses", "--longest", "--examples", "1")
    assert "who·are·you?" in printed and "loss" not in printed and printed.count(data_file) == 1


def test_the_settings_of_the_data_are_those_of_training(capsys, model_folder, data_file):
    flags = ("--model", model_folder, "--data", data_file, "--no-losses", "--examples", "9", "--eval-share", "0")
    printed, _ = look(capsys, *flags, "--max-length", "64", "--truncate", "--system", "be brief")
    assert printed.count("system") >= 5 and printed.count("be·brief") == 5
    cut, _ = look(capsys, *flags, "--max-length", "24", "--truncate")
    assert "more were cut" in cut and re.search(r"cut +", cut)


def test_other_data_than_the_run_had_is_said(capsys, run, tmp_path, settings):
    out, _ = run
    moved = tmp_path / "run"
    shutil.copytree(out, moved)
    record = json.loads((moved / "job.json").read_text())
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "another", "completion": "one"}\n{"prompt": "a", "completion": "b"}\n')
    record["settings"]["data"] = str(other)
    (moved / "job.json").write_text(json.dumps(record))
    beside = look(capsys, "--adapter", moved, "--no-losses")[1]
    assert f"{other}: not the data that the run was trained on" in beside
    assert "not the data" not in look(capsys, "--adapter", moved, "--no-losses", "--data", other)[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "{model}"], "--data: missing"),
        (["--data", "{data}"], "--model: missing"),
        (["--model", "{model}", "--data", "{data}", "--examples", "0"], "examples=0: wanted a whole number >= 1"),
        (["--model", "{model}", "--data", "{data}", "--eval-share", "0", "--held"], "--held: nothing is held out"),
        (["--model", "{model}", "--data", "{data}", "--out", "{folder}"], "is a folder; wanted a file"),
        (["--model", "{model}", "--data", "{folder}/none.jsonl"], "none.jsonl"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line(capsys, model_folder, data_file, tmp_path, flags, words):
    known = {"model": model_folder, "data": data_file, "folder": tmp_path}
    assert main(["look", *(flag.format(**known) for flag in flags)]) == 2
    said = capsys.readouterr().err
    assert words in said.splitlines()[-1]


def test_on_a_terminal_rich_colours_the_tokens(capsys, monkeypatch, model_folder, data_file):
    console = pytest.importorskip("rich.console")
    made = console.Console(force_terminal=True, color_system="256", width=200, highlight=False)
    monkeypatch.setattr(sys.modules["minilora.cli.say"], "_console", lambda: made)
    with contextlib.suppress(AttributeError), made.capture() as caught:
        assert main(["look", "--model", model_folder, "--data", data_file, "--examples", "1", "--eval-share", "0"]) == 0
    assert "\x1b[4" in caught.get() and "48;5;" in caught.get()  # underlined, and a colour behind it
    assert re.search("user +read", caught.get())


# ---- which examples


def test_the_examples_are_those_that_training_takes(settings, data_file):
    from minilora.job.given import job_from

    job = job_from(settings | {"out": "nowhere", "data": [data_file, f"{data_file}:2"]})
    picked = pick(job, 9, False, False, lambda line: None)
    assert len(picked.examples) == len({one.input_ids for one in picked.examples})
    longest = chosen(picked.examples, 2, longest=True)
    assert len(longest[0].input_ids) == max(len(one.input_ids) for one in picked.examples)
    (first, *_) = lenses_of(picked.examples, picked.looked.learn, picked.tokenizer, picked.way)
    assert first.example == picked.examples[0] and first.tokens[0].role == "template" and first.warning == ""
    with pytest.raises(DataError, match="nothing is held out"):
        pick(job_from(settings | {"out": "x", "eval_share": 0.0}), 1, False, True, lambda line: None)
    assert len(read(data_file)) == 5

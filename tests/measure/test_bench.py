"""minilora bench: the table from given figures, the two sides on one tiny job, and the whole command."""

import importlib.util

import pytest
import torch

from minilora.cli import main
from minilora.measure.bench import Side, agreement, as_rows
from minilora.report.page import as_page
from minilora.report.tables import Row, as_markdown, as_text

transformers = pytest.importorskip("transformers")

from minilora.hf import bench  # noqa: E402
from minilora.hf.bench import BenchJob  # noqa: E402


def two(second=1.5):
    ours = Side(
        "minilora", {}, [[2.0, 1.5]] * 2, [[9.0, 1.0], [9.0, 3.0]], [[9.0, 1.5]], 100_000_000, 300_000_000, 1000, 40_000
    )
    theirs = Side(
        "PEFT", {}, [[2.0, second]] * 2, [[9.0, 4.0], [9.0, 4.0]], [[9.0, 4.5]], 200_000_000, None, 1000, 50_000
    )
    return [ours, theirs]


# ---- the table


def test_the_first_step_of_each_run_is_not_timed():
    (ours, theirs), alone = two(), Side("minilora", {}, [[1.0]], [[5.0]], [[4.0]])
    assert (ours.timed, ours.median, theirs.median, alone.median) == ([1.0, 3.0], 2.0, 4.0, 5.0)


def test_the_table_says_what_was_measured():
    columns, rows = as_rows(two(), tokens=512)
    table = {row.name.strip(): list(row.texts) for row in rows}
    assert columns == ["minilora", "PEFT", "PEFT / minilora"]
    assert table["loss, step 2"] == ["1.50000", "1.50000", ""]
    assert table["time per step, median (s)"] == ["2.000", "4.000", "2.00x"]
    assert table["fastest - slowest"] == ["1.000 - 3.000", "4.000 - 4.000", ""]
    assert table["processor time per step (s)"] == ["1.500", "4.500", "3.00x"]
    assert table["tokens per second"] == ["256", "128", "0.50x"]
    assert table["peak memory of training (MB)"] == ["100", "200", "2.00x"]
    assert table["libraries in memory (MB)"] == ["300", "–", ""]
    assert table["trainable parameters"] == ["1,000", "1,000", "1.00x"]
    assert all(len(row.texts) == len(columns) for row in rows)


def test_a_library_alone_has_a_table_too():
    columns, rows = as_rows(two()[:1], tokens=512)
    assert columns == ["minilora"] and all(len(row.texts) == 1 for row in rows)
    assert agreement(two()[:1], "float32") == (True, "")


@pytest.mark.parametrize(("second", "dtype", "agree"), [(1.5, "float32", True), (1.5005, "float32", True),
                                                       (1.51, "float32", False), (1.51, "bfloat16", True)])  # fmt: skip
def test_losses_are_compared(second, dtype, agree):
    found, words = agreement(two(second), dtype)
    assert found is agree and words.startswith("Losses agree" if agree else "LOSSES DIFFER")
    assert not agree or "2 steps, 4 runs" in words


def test_a_repeat_that_differs_is_seen():
    sides = two()
    sides[1].losses = [[2.0, 1.5], [2.0, 1.7]]
    assert agreement(sides, "float32")[0] is False


def test_bars_are_as_long_as_their_values():
    rows = [Row("a", ["8", "4"], [8, 4], "g"), Row("b|c", ["2", ""], [2, None], "g"), Row("d", ["x", "y"])]
    text = as_text(["one", "two"], rows)
    assert [line.count("█") for line in text.splitlines()] == [0, 24, 12, 6, 0]
    assert [line.split()[-1] for line in text.splitlines()] == ["two", "one", "two", "one", "y"]
    assert "█" not in as_text(["one", "two"], rows, bars=False)
    markdown = as_markdown(["one", "two"], rows).splitlines()
    assert markdown[1] == "| --- | ---: | ---: |" and markdown[3] == "| b\\|c | 2 |  |"
    page = as_page("t", "s", [], ["one", "<two>"], rows, ["a & b"])
    assert "&lt;two&gt;" in page and "<two>" not in page and "a &amp; b" in page


# ---- one job, two libraries


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, make_llama):
    folder = str(tmp_path_factory.mktemp("bench") / "model")
    make_llama(hidden_size=128, intermediate_size=192).save_pretrained(folder)
    return folder


def settings(model_folder, folder, **more):
    import dataclasses

    job = BenchJob(model_folder, r=3, seq=16, batch=2, steps=3, repeats=1, data="random", lr=0.01, **more)
    return dataclasses.asdict(job) | {"start": f"{folder}/start", "folder": str(folder), "batches": bench._batches(job)}


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_both_sides_do_the_same_job(tmp_path, model_folder, quant):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from minilora.hf import peers

    given = settings(model_folder, tmp_path, quant=quant)
    bench.make_start(given)("make")
    losses, finished = {}, {}
    for serve in (bench.serve, peers.serve):
        ask = serve(given)
        said = ask("load")
        losses[serve] = [ask("step")["loss"] for _ in range(3)]
        finished[serve] = ask("finish")
        assert set(said["versions"]) == (
            {"minilora"} if serve is bench.serve else {"PEFT"} | ({"bitsandbytes"} if quant != "none" else set())
        )
    ours, theirs = losses.values()
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert len({round(loss, 3) for loss in ours}) > 1
    assert finished[bench.serve]["trainable"] == finished[peers.serve]["trainable"] > 0
    # Our seal says something of each tensor of the base, which shows beside an adapter this small.
    assert finished[bench.serve]["adapter"] == pytest.approx(finished[peers.serve]["adapter"], rel=0.2)


def test_batches_come_from_the_data_in_its_order(tmp_path, model_folder, monkeypatch):
    class Letters:
        eos_token = bos_token = chat_template = None

        def __call__(self, text, add_special_tokens):
            return type("Ids", (), {"input_ids": [ord(letter) - 97 for letter in text]})

    monkeypatch.setattr(bench, "load_tokenizer", lambda name, trust: Letters())
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "abc"}\n{"text": "de"}\n')
    job = BenchJob(model_folder, steps=2, batch=2, seq=3, data=str(file))
    assert bench._batches(job) == [[[0, 1, 2], [3, 4, 0]], [[1, 2, 3], [4, 0, 1]]]


def test_random_batches_are_the_same_every_time(model_folder):
    job = BenchJob(model_folder, steps=2, batch=2, seq=4, data="random")
    assert bench._batches(job) == bench._batches(job)
    assert torch.tensor(bench._batches(job)).shape == (2, 2, 4)


@pytest.mark.parametrize(
    ("gone", "quant", "lines"), [("peft", "none", 1), ("bitsandbytes", "nf4", 1), ("bitsandbytes", "none", 0)]
)
def test_a_library_that_is_not_there_is_said_in_a_line(monkeypatch, model_folder, gone, quant, lines):
    there = importlib.util.find_spec("torch")
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == gone else there)
    missing = bench._missing(BenchJob(model_folder, quant=quant))
    assert len(missing) == lines and all(f"pip install {gone}" in line for line in missing)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "/nowhere/at/all"], "'/nowhere/at/all'"),
        (["--steps", "0"], "steps=0: wanted a whole number >= 1"),
        (["--repeats", "0"], "repeats=0"),
        (["--lr", "0"], "lr=0.0: wanted a number in (0, 1)"),
        (["--quant", "int3"], "quant='int3'"),
        (["--seed", "-1"], "seed=-1"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "demo"], "tokenizer"),
    ],
)
def test_a_mistake_is_one_line(capsys, model_folder, flags, words):
    assert main(["bench", "--model", model_folder, "--seq", "16", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("minilora: ") and words in line


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--quant", "nf4", "--markdown"]])
def test_the_command_runs_both_and_compares(capsys, tmp_path, model_folder, flags):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    page = tmp_path / "bench.html"
    small = ["--seq", "16", "--batch", "2", "--steps", "2", "--repeats", "2", "--threads", "1", "--data", "random"]
    assert main(["bench", "--model", model_folder, *small, *flags, "--html", str(page)]) == 0
    captured = capsys.readouterr()
    assert "Losses agree: 2 steps, 4 runs" in captured.out and "PEFT / minilora" in captured.out
    assert captured.err.count("step 2/2") == 2  # progress, at every step of every run
    assert captured.out.count("\n| ") == (12 if flags else 0)
    assert "The same losses" in page.read_text(encoding="utf-8")

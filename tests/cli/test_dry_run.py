"""``--dry-run``: what is said before the first step, and that nothing is trained or written; ``--threads``."""

import json
import re

import pytest
import torch

from minilora.cli import main
from minilora.job import finetune

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "learn.jsonl"
    pairs = {"hi": "yo", "1 < 2?": "true", "who?": "me", "where?": "here"}
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs.items()))
    return str(path)


def run(capsys, model, data, out, *more):
    flags = ["--model", model, "--data", data, "--out", str(out), "--batch-size", "2", "--max-length", "64"]
    code = main(["train", *flags, *more])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_all_up_to_the_first_step_is_said_and_nothing_is_written(
    capsys, monkeypatch, model_folder, data_file, tmp_path
):
    monkeypatch.setattr(finetune, "train", lambda *a, **b: pytest.fail("it trains"))
    monkeypatch.setattr(finetune, "answers", lambda *a, **b: pytest.fail("it asks"))
    more = ("--dry-run", "--epochs", "2", "--accumulate", "2", "--prompts", "hi", "--eval-share", "0.25", "--r", "3")
    code, text = run(capsys, model_folder, data_file, tmp_path / "run", *more)
    assert code == 0, text
    assert not (tmp_path / "run").exists()
    assert re.search(r"training [\d,]+ of [\d,]+ parameters for 2 steps", text)
    assert re.search(r"tokens: [\d,]+ an epoch, of which [\d,]+ are learnt; 1 examples to evaluate on", text)
    assert "first step: 2 micro-batches; the first has 2 examples in" in text and "(cosine)" in text
    learnt = [line.split(None, 1)[1] for line in text.splitlines() if line.startswith("  learnt")]
    read = [line for line in text.splitlines() if line.startswith("  read")]
    assert len(learnt) == 2 and all(any(word in line for word in ("yo", "true", "me", "here")) for line in learnt)
    assert any(word in "".join(read) for word in ("hi", "1 < 2?", "who?", "where?"))
    assert re.search(r"peak +[\d,.]+ MB", text) and "activations" in text
    assert f"dry run: nothing was trained, and nothing is written into {tmp_path / 'run'}\n" in text


def test_the_counts_are_those_of_the_first_step_of_the_run(capsys, model_folder, data_file, tmp_path):
    more = ("--steps", "1", "--eval-share", "0", "--pack", "on")
    _, text = run(capsys, model_folder, data_file, tmp_path / "dry", *more, "--dry-run")
    assert run(capsys, model_folder, data_file, tmp_path / "run", *more)[0] == 0
    (step,) = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert (
        f": {step['tokens']} tokens, " in text
        and f"{step['lr']:.2g} in step 1" in text
        and "examples are packed: " in text
    )


def test_what_lora_fa_freezes_is_not_counted_as_trained(capsys, model_folder, data_file, tmp_path):
    counts, states = {}, {}
    for name in ("adamw", "lora_fa"):
        out = tmp_path / name
        code, text = run(capsys, model_folder, data_file, out, "--optimizer", name, "--steps", "1", "--r", "3")
        assert code == 0, text
        counts[name] = int(re.search(r"training ([\d,]+) of", text)[1].replace(",", ""))
        states[name] = sum(p.stat().st_size for p in out.glob("checkpoint-1/optimizer.safetensors"))
    assert 0 < counts["lora_fa"] < counts["adamw"] and 0 < states["lora_fa"] < states["adamw"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--r", "0"], "r=0"),
        (["--eval-share", "0", "--patience", "2", "--eval-every", "1"], "patience: there is no data to evaluate on"),
        (["--target-modules", "q_porj"], "'q_proj'"),
        (["--variant", "vera", "--loraplus-lr-ratio", "4"], "loraplus_lr_ratio=4.0: no lora_B trains here"),
        (["--variant", "vera", "--optimizer", "muon"], "optimizer='muon': no matrix lora_A or lora_B trains here"),
        (["--variant", "lora_xs", "--optimizer", "lora_fa"], "optimizer='lora_fa': no lora_B trains beside a lora_A"),
        (["--variant", "lora_xs", "--r", "99"], "LoRA-XS takes r of the weight's singular directions, and r=99"),
    ],
)
def test_what_a_run_would_refuse_is_refused(capsys, model_folder, data_file, tmp_path, flags, words):
    code, text = run(capsys, model_folder, data_file, tmp_path / "run", "--dry-run", *flags)
    assert code == 2 and words in text and not (tmp_path / "run").exists()


def test_a_run_that_lies_there_is_told(capsys, model_folder, data_file, tmp_path):
    (tmp_path / "log.jsonl").write_text("")
    code, text = run(capsys, model_folder, data_file, tmp_path, "--dry-run")
    assert code == 2 and "holds a run already" in text
    assert run(capsys, model_folder, data_file, tmp_path, "--dry-run", "--overwrite")[0] == 0
    assert (tmp_path / "log.jsonl").exists()


def test_so_many_threads_compute_while_the_job_goes(capsys, monkeypatch, model_folder, data_file, tmp_path):
    seen, real, before = [], finetune.train, torch.get_num_threads()
    monkeypatch.setattr(finetune, "train", lambda *a, **b: seen.append(torch.get_num_threads()) or real(*a, **b))
    assert run(capsys, model_folder, data_file, tmp_path, "--steps", "1", "--threads", str(before + 1))[0] == 0
    assert seen == [before + 1] and torch.get_num_threads() == before

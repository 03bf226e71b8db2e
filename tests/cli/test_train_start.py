"""What a job begins with: an adapter that was saved, a start that looks at the data, a variant by name."""

import dataclasses
import json
import shutil

import pytest
import safetensors.torch
import torch

from minilora import LoraConfig
from minilora.cli import main
from minilora.errors import ConfigError
from minilora.job.finetune import Job, fine_tune
from minilora.store.load import read_adapter
from minilora.training.settings import TrainConfig

pytest.importorskip("transformers")
FILE = "adapter_model.safetensors"


def data(path, pairs):
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs.items()))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    first = {"hi": "yo", "1 < 2?": "true", "who?": "me", "where?": "here"}
    return data(place / "first.jsonl", first), data(place / "second.jsonl", {"ho": "no", "when?": "now", "how?": "so"})


def run(capsys, model, file, out, *more):
    """Exit code and what was said."""
    flags = ["--model", model, "--data", file, "--out", str(out), "--eval-share", "0", "--batch-size", "2"]
    code = main(["train", *flags, "--max-length", "64", "--lr", "0.01", *more])
    said = capsys.readouterr()
    return code, said.out + said.err


ADAPTER = ("--r", "3", "--lora-alpha", "5", "--target-modules", "q_proj", "down_proj", "--rank-pattern", "down_proj=2")


@pytest.fixture(scope="module")
def saved(model_folder, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "run"
    flags = ["--model", model_folder, "--data", files[0], "--out", str(out), "--eval-share", "0", "--quant", "none"]
    assert main(["train", *flags, "--steps", "3", "--lr", "0.01", *ADAPTER]) == 0
    return out


def tensors(folder):
    return safetensors.torch.load_file(folder / FILE)


def test_training_goes_on_from_a_saved_adapter_with_its_settings(capsys, model_folder, files, saved, tmp_path):
    more = ("--init-from", str(saved), "--steps", "1", "--quant", "none")
    code, text = run(capsys, model_folder, files[1], tmp_path, *more, "--lr", "1e-12")
    assert code == 0 and f"goes on from the adapter in {saved}" in text
    ours, theirs = tensors(tmp_path), tensors(saved)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-9)
    assert read_adapter(tmp_path).config == read_adapter(saved).config
    assert "init_from" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--r", "8"], "r=8: the adapter in {} has 3"),  # the default of a fresh start is no exception
        (["--lora-alpha", "6"], "lora_alpha=6: the adapter in {} has 5"),
        (["--target-modules", "q_proj"], "target_modules=('q_proj',): the adapter in {} has ('down_proj', 'q_proj')"),
        (["--variant", "vera"], "variant='vera': the adapter in {} is 'lora'"),
        (["--use-dora"], "use_dora=True: the adapter in {} has False"),
    ],
)
def test_a_flag_that_contradicts_it_is_refused_by_name(capsys, model_folder, files, saved, tmp_path, flags, words):
    code, text = run(capsys, model_folder, files[1], tmp_path / "run", "--init-from", str(saved), *flags)
    assert code == 2 and words.format(saved) in text and not (tmp_path / "run").exists()


def test_a_flag_that_agrees_is_no_contradiction(capsys, model_folder, files, saved, tmp_path):
    more = ("--init-from", str(saved), "--steps", "1", *ADAPTER)
    assert run(capsys, model_folder, files[1], tmp_path, *more)[0] == 0  # packed: the same base, as load_adapter has it


def test_another_base_model_is_refused_unless_it_is_allowed(capsys, make_llama, model_folder, files, saved, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    weights = safetensors.torch.load_file(other / "model.safetensors")
    weights = {name: tensor + 0.01 for name, tensor in weights.items()}
    safetensors.torch.save_file(weights, other / "model.safetensors", {"format": "pt"})
    more = ("--init-from", str(saved), "--steps", "1", "--quant", "none")
    code, text = run(capsys, str(other), files[1], tmp_path / "run", *more)
    assert code == 2
    assert "was trained on another base model" in text and "--allow-other-base" in text
    assert not (tmp_path / "run" / "log.jsonl").exists()
    assert run(capsys, str(other), files[1], tmp_path / "run", *more, "--allow-other-base")[0] == 0


def test_it_is_part_of_what_the_run_is_and_resume_ends_in_the_same_bits(capsys, model_folder, files, saved, tmp_path):
    more = ("--steps", "4", "--save-every", "2", "--quant", "none")
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert run(capsys, model_folder, files[1], whole, "--init-from", str(saved), *more)[0] == 0
    half.mkdir()
    shutil.copytree(whole / "checkpoint-2", half / "checkpoint-2")
    code, text = run(capsys, model_folder, files[1], half, *ADAPTER, "--resume", *more)
    assert code == 2 and "another schedule: init_from is None, in the checkpoint" in text
    assert run(capsys, model_folder, files[1], half, "--init-from", str(saved), "--resume", *more)[0] == 0
    assert (half / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_a_job_in_python_takes_its_config_and_refuses_another(model_folder, files, saved, tmp_path):
    job = {"model": model_folder, "data": files[1], "init_from": str(saved), "training": TrainConfig(steps=1)}
    fine_tune(Job(**job, out=str(tmp_path / "a")), lambda line: None)
    assert read_adapter(tmp_path / "a").config.r == 3
    same = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2})
    with pytest.raises(ConfigError, match=r"^lora_dropout=0\.5: the adapter in"):
        fine_tune(Job(**job, out=str(tmp_path / "b"), lora=dataclasses.replace(same, lora_dropout=0.5)))
    fine_tune(Job(**job, out=str(tmp_path / "b"), lora=same), lambda line: None)


@pytest.mark.parametrize("name", ["vera", "lora_fa", "lora_xs"])
def test_a_variant_is_named_and_goes_on_as_one(capsys, model_folder, files, tmp_path, name):
    more = ("--steps", "2", "--r", "3")
    assert run(capsys, model_folder, files[0], tmp_path / "a", "--variant", name, *more)[0] == 0
    assert read_adapter(tmp_path / "a").variant == name
    assert run(capsys, model_folder, files[1], tmp_path / "b", "--init-from", str(tmp_path / "a"), *more[:2])[0] == 0
    assert read_adapter(tmp_path / "b").variant == name


def test_an_unknown_variant_is_refused_before_a_model_is_loaded(capsys, model_folder, files, tmp_path):
    code, text = run(capsys, model_folder, files[0], tmp_path / "a", "--variant", "veera")
    assert code == 2 and "variant 'veera' is not registered; known are 'vera'" in text and not (tmp_path / "a").exists()


@pytest.mark.parametrize("start", ["eva", "corda", "lora_ga"])
def test_a_start_looks_at_the_data_and_resume_ends_in_the_same_bits(capsys, model_folder, files, tmp_path, start):
    more = ("--init-lora-weights", start, "--quant", "none", "--steps", "3", "--r", "2", "--save-every", "1")
    more = (*more, "--target-modules", "q_proj", "down_proj", "--start-examples", "3")
    whole, half = tmp_path / "whole", tmp_path / "half"
    code, text = run(capsys, model_folder, files[0], whole, *more, "--keep-checkpoints", "9")
    assert code == 0 and f"{start} looks at 3 examples for its start" in text, text
    half.mkdir()
    shutil.copytree(whole / "checkpoint-1", half / "checkpoint-1")
    assert run(capsys, model_folder, files[0], half, *more, "--resume")[0] == 0
    assert (half / FILE).read_bytes() == (whole / FILE).read_bytes()
    plain = tmp_path / "plain"
    assert run(capsys, model_folder, files[0], plain, *more[2:])[0] == 0
    assert (plain / FILE).read_bytes() != (whole / FILE).read_bytes()


@pytest.mark.parametrize(
    ("flags", "holds"),
    [
        (["--use-dora"], "lora_magnitude_vector"),
        (["--init-lora-weights", "pissa"], "lora_A"),
        (
            ["--init-lora-weights", "loftq", "--quant", "none", "--loftq-config", "loftq_bits=4", "loftq_iter=2"],
            "lora_A",
        ),
        (["--trainable-token-indices", "embed_tokens=3,4"], "token_adapter"),
        (["--layers-to-transform", "1"], "layers.1."),
        (["--lora-bias"], "lora_B.bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_fields_of_the_adapter_reach_the_file(capsys, model_folder, files, tmp_path, flags, holds):
    more = ("--steps", "2", "--r", "2", "--target-modules", "q_proj")
    code, text = run(capsys, model_folder, files[0], tmp_path, *more, *flags)
    assert code == 0, text
    names = tensors(tmp_path)
    assert any(holds in name for name in names), list(names)
    assert not (flags[0] == "--layers-to-transform" and any("layers.0." in name for name in names))

"""``minilora info``: every kind of folder, what is told of it, and a line for what is none."""

import json
import shutil

import pytest
import safetensors.torch

from minilora import LoraConfig, inject, quantize_model, save_adapter
from minilora.cli import main
from minilora.errors import CheckpointError
from minilora.export.folders import export_folder
from minilora.hf.packed import save_packed
from minilora.job.finetune import fine_tune
from minilora.job.info import look
from tests import models


@pytest.fixture(scope="module")
def run(make_job, tmp_path_factory):
    """A run with a checkpoint of its middle and held-out examples."""
    out = tmp_path_factory.mktemp("run") / "out"
    outcome = fine_tune(make_job(out, steps=4, eval_share=0.2, training={"save_every": 2}), lambda line: None)
    return out, outcome


@pytest.fixture
def adapter(tmp_path):
    """An adapter folder of a small Llama whose base is not on this disk."""
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "up_proj"], base_model_name_or_path="no/where")
    save_adapter(models.randomize(inject(models.llama(), config)), tmp_path / "a")
    return tmp_path / "a"


def shown(capsys, folder, *more):
    assert main(["info", str(folder), *more]) == 0
    return capsys.readouterr().out


def test_a_run(run, capsys, model_folder):
    out, outcome = run
    found = look(out)
    assert (found["kind"], found["base"], found["variant"]) == ("run", model_folder, "lora")
    assert found["layers"] == {"covered": 14, "of": 15, "without": ["lm_head"]}
    assert found["ranks"] == {"3": 14} and found["scalings"] == {"2.33333": 14}
    assert found["run"]["steps"] == 4
    assert found["run"]["loss"] == [outcome.losses[0], outcome.losses[-1]]
    assert found["run"]["packing"] == "packed to nf4, double quantization"
    assert sum(row["layers"] for row in found["updates"]) == 14 and not found["untrained"]
    text = shown(capsys, out)
    assert text.startswith(f"{out}: run\n") and "14 of 15 linear weights, experts included; not lm_head" in text
    assert f"{outcome.losses[0]:.3f} -> {outcome.losses[-1]:.3f}" in text and "who takes it:" in text


def test_a_checkpoint_and_a_run_that_has_not_ended(run, tmp_path, capsys):
    out, _ = run
    assert look(out / "checkpoint-2")["kind"] == "checkpoint of a run"
    shutil.copytree(out, tmp_path / "half")
    for name in ("adapter_config.json", "adapter_model.safetensors", "minilora.json"):
        (tmp_path / "half" / name).unlink()
    found = look(tmp_path / "half")
    assert found["kind"] == "run that has not ended" and 2 in found["checkpoints"] and found["run"]["steps"] == 4
    assert "checkpoints" in shown(capsys, tmp_path / "half")


def test_an_adapter_of_an_unknown_base(adapter, capsys):
    found = look(adapter)
    assert found["kind"] == "adapter" and found["layers"] == {"covered": 4, "of": None, "without": []}
    text = shown(capsys, adapter)
    assert "4 (of how many is not known: the base is not on this disk)" in text and "seal            whole" in text
    assert {row["kind"]: row["layers"] for row in found["updates"]} == {"q_proj": 2, "up_proj": 2}


def test_the_table_has_the_norms(adapter, capsys):
    (row,) = [row for row in look(adapter)["updates"] if row["kind"] == "q_proj"]
    assert row["norm"] > row["largest"] > 0 and row["largest_in"].endswith("q_proj")
    assert f"{row['norm']:,.4g}" in shown(capsys, adapter)


def test_what_the_base_decides_is_said_to_be(tmp_path, capsys):
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj"], use_dora=True)
    save_adapter(inject(models.llama(), config), tmp_path / "a")
    assert "-: the weights of the base decide it" in shown(capsys, tmp_path / "a")


def test_an_adapter_that_has_learnt_nothing(tmp_path, capsys):
    save_adapter(inject(models.llama(), LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj"])), tmp_path / "a")
    text = shown(capsys, tmp_path / "a")
    assert "2 of 2 layers: B is all zeros" in text and text.splitlines()[0].endswith(": adapter")


def test_a_folder_of_peft(tmp_path, capsys):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=3, lora_alpha=12, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 5}
    )
    peft.get_peft_model(models.llama(), config).save_pretrained(tmp_path / "a")
    found = look(tmp_path / "a")
    assert found["seal"].startswith("none") and found["ranks"] == {"3": 1, "5": 1} and found["untrained"] == 2
    shown(capsys, tmp_path / "a")


def test_copies_stand_beside(tmp_path, capsys):
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj"], modules_to_save=["lm_head"])
    save_adapter(inject(models.llama(), config), tmp_path / "a")
    assert "lm_head (4,096 numbers)" in shown(capsys, tmp_path / "a")


def test_a_packed_model_and_a_dense_one(tmp_path, capsys, model_folder):
    save_packed(quantize_model(models.llama()), tmp_path / "packed")
    found = look(tmp_path / "packed")
    assert (found["kind"], found["format"], found["packed_layers"]) == ("packed model", "nf4", 14)
    assert not found["double_quant"] and found["architecture"] == "LlamaForCausalLM"
    assert "14 weights in nf4" in shown(capsys, tmp_path / "packed")
    dense = look(model_folder)
    assert dense["kind"] == "model" and dense["dtypes"] == {"float32": dense["dtypes"]["float32"]}
    assert "packed          no" in shown(capsys, model_folder)


def test_an_export_for_mlx(adapter, tmp_path, capsys):
    export_folder(adapter, tmp_path / "mlx", "mlx")
    assert shown(capsys, tmp_path / "mlx").startswith(f"{tmp_path / 'mlx'}: adapter for MLX\n")


def test_json_is_all_of_it(run, capsys):
    assert json.loads(shown(capsys, run[0], "--json")) == json.loads(json.dumps(look(run[0])))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda place: shutil.rmtree(place), "no such folder"),
        (lambda place: [file.unlink() for file in place.iterdir()], "neither an adapter"),
        (lambda place: (place / "adapter_config.json").unlink(), "adapter_config.json"),
        (lambda place: (place / "adapter_config.json").write_text("{"), "adapter_config.json"),
        (lambda place: (place / "adapter_model.safetensors").write_bytes(b"no"), "adapter_model.safetensors"),
        (lambda place: (place / "minilora.json").write_text("{}"), "minilora.json: damaged"),
    ],
)
def test_a_bad_folder_is_one_line(adapter, capsys, damage, message):
    damage(adapter)
    with pytest.raises(CheckpointError):
        look(adapter)
    assert main(["info", str(adapter)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and message in said.err


def test_a_bad_model_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text("[1]")
    assert main(["info", str(tmp_path)]) == 2
    assert "config.json: not JSON" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    assert main(["info", str(tmp_path)]) == 2
    safetensors.torch.save_file({}, tmp_path / "model.safetensors")
    assert main(["info", str(tmp_path)]) == 0

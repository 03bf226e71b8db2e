"""Code that comes with a model runs when its user says so, and never else; nobody is asked for it on standard input."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minilora
from minilora import LoraConfig, inject, save_adapter
from minilora.cli import main
from minilora.errors import CheckpointError, ConfigError

pytest.importorskip("transformers")
from minilora.hf import load_model, load_tokenizer
from minilora.hf.folders import read_config
from minilora.hf.load import skeleton
from minilora.hf.trials import PlanJob
from minilora.peft.auto import AutoPeftModelForCausalLM

ROOT = Path(minilora.__file__).parents[1]
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

with open({marker!r}, "a") as ran:
    ran.write("ran\\n")

class StrangeConfig(LlamaConfig):
    model_type = "strange"

class StrangeModel(LlamaForCausalLM):
    config_class = StrangeConfig

class StrangeTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def strange(model_folder, tmp_path, monkeypatch):
    """``(folder, marker)``: a model that no transformers knows, with the code for it; the marker is there once the code has run."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    place, marker = tmp_path / "strange", tmp_path / "ran"
    shutil.copytree(model_folder, place)
    classes = {"AutoConfig": "code.StrangeConfig", "AutoModelForCausalLM": "code.StrangeModel"}
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"model_type": "strange", "auto_map": classes}))
    (place / "code.py").write_text(CODE.format(marker=str(marker)))
    return str(place), marker


def own_tokenizer(place):
    """Let the folder's tokenizer be its own code, too."""
    file = Path(place) / "tokenizer_config.json"
    said = json.loads(file.read_text())
    said |= {"tokenizer_class": "StrangeTokenizer", "auto_map": {"AutoTokenizer": ["code.StrangeTokenizer", None]}}
    file.write_text(json.dumps(said))


@pytest.mark.parametrize("load", [load_model, skeleton, lambda place: read_config(place, place)])
def test_code_of_a_model_does_not_run_and_the_flag_is_named(strange, load):
    place, marker = strange
    with pytest.raises(CheckpointError, match=r"Python code of its own, which is not run.*--trust-remote-code"):
        load(place)
    assert not marker.exists()


@pytest.mark.parametrize("load", [load_model, skeleton])
def test_code_of_a_model_runs_for_who_trusts_it(strange, load):
    place, marker = strange
    model = load(place, trust_remote_code=True)
    assert type(model).__name__ == "StrangeModel" and marker.exists()


def test_code_of_a_tokenizer_runs_for_who_trusts_it_alone(strange):
    place, marker = strange
    own_tokenizer(place)
    with pytest.raises(CheckpointError, match=r"Python code of its own, which is not run.*--trust-remote-code"):
        load_tokenizer(place)
    assert not marker.exists()
    assert type(load_tokenizer(place, trust_remote_code=True)).__name__ == "StrangeTokenizer" and marker.exists()


def test_what_is_trusted_is_the_model_of_its_code(strange, model_folder, ids):
    theirs, known = load_model(strange[0], trust_remote_code=True), load_model(model_folder)
    assert torch.equal(theirs(ids).logits, known(ids).logits)


def test_the_base_that_an_adapter_names_is_trusted_by_its_user_alone(strange, tmp_path):
    place, marker = strange
    model = inject(load_model(place, trust_remote_code=True), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": place}))
    (tmp_path / "adapter" / "minilora.json").unlink()
    marker.unlink()
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert not marker.exists()
    found = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    assert [path for path, _ in found.named_modules() if path.endswith("q_proj.lora_A")] or found.peft_config


COMMANDS = {
    "train": ["--data", "{data}", "--out", "{out}", "--steps", "1", "--batch-size", "1", "--eval-share", "0", "--max-length", "64"],
    "generate": ["--max-new-tokens", "1", "hi"],
    "plan": ["--seq", "8", "--batch", "1", "--no-measure"],
    "quantize": ["--out", "{out}"],
    "merge": ["--adapter", "{adapter}", "--out", "{out}"],
    "export": ["--adapter", "{adapter}", "--for", "mlx", "--out", "{out}"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_takes_a_model_can_be_told_to_trust_it(strange, tmp_path, command, capsys):
    place, marker = strange
    (tmp_path / "data.jsonl").write_text('{"prompt": "hi", "completion": "yo"}\n')
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
    save_adapter(inject(load_model(place, trust_remote_code=True), config), tmp_path / "adapter")
    marker.unlink()
    names = {"data": tmp_path / "data.jsonl", "out": tmp_path / "out", "adapter": tmp_path / "adapter"}
    words = [command, "--model", place, *(word.format(**names) for word in COMMANDS[command])]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "give --trust-remote-code" in said and said.count("minilora: ") == 1 and not marker.exists()
    assert not (tmp_path / "out").exists()
    assert main([*words, "--trust-remote-code"]) == 0, capsys.readouterr().err


def test_jobs_carry_it_to_the_processes_that_measure():
    assert PlanJob("m", trust_remote_code=True).trust_remote_code
    with pytest.raises(ConfigError, match="trust_remote_code='yes'"):
        PlanJob("m", trust_remote_code="yes")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "bench"])
def test_a_process_that_measures_trusts_what_its_user_trusts(strange, command):
    place, marker = strange
    words = ["--model", place, "--seq", "8", "--batch", "1"]
    words += ["--steps", "2", "--repeats", "1", "--data", "random"] if command == "bench" else []
    run = [sys.executable, "-m", "minilora", command, *words]
    done = subprocess.run([*run, "--trust-remote-code"], capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr
    assert marker.read_text().count("ran") >= 2
    marker.unlink()
    done = subprocess.run(run, capture_output=True, text=True, cwd=ROOT, timeout=500, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "give --trust-remote-code" in done.stderr and not marker.exists()


def test_a_settings_file_may_not_trust(tmp_path, capsys):
    file = tmp_path / "job.toml"
    file.write_text('model = "m"\ndata = "d"\nout = "o"\ntrust_remote_code = true\n')
    assert main(["train", "--config", str(file)]) == 2
    assert "a file may not let code run; give --trust-remote-code" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [
        {"attn_implementation": "stranger/kernel"},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"_experts_implementation": "stranger/kernel@main:f"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_code_of_a_hub_that_a_config_names_is_not_fetched(model_folder, tmp_path, fields, monkeypatch):
    """transformers fetches such a kernel and runs it, whatever ``trust_remote_code`` says."""
    place = tmp_path / "model"
    shutil.copytree(model_folder, place)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | fields))
    for load in (load_model, skeleton):
        with pytest.raises(CheckpointError, match="is code of a hub, which is not run"):
            load(str(place))


PICKLES = ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "pytorch_model-00001-of-00002.bin", "last.ckpt"]


@pytest.mark.parametrize("name", PICKLES)
def test_pickled_weights_are_refused_by_name(model_folder, tmp_path, name):
    """Opening the file would write the marker."""
    place, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model_folder, place)
    (place / "model.safetensors").unlink()
    (place / name).write_bytes(b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    with pytest.raises(
        CheckpointError, match=f"a pickle \\({name}\\), which can run code and is never read; .*save_pretrained"
    ):
        load_model(str(place))
    assert not marker.exists()


def test_a_pickle_beside_safetensors_is_not_opened(model_folder, tmp_path):
    place, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(model_folder, place)
    (place / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    load_model(str(place))
    assert not marker.exists()

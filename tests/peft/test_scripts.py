"""Scripts that are written for PEFT, run as they stand: once with PEFT, once with ``python -m minilora.peft``, and the results compared."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPTS = Path(__file__).parent / "scripts"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")


def run(how, script, *arguments):
    """The last line that a script prints, as JSON; ``how`` is the command between python and the script."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    command = [sys.executable, *how, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def both(script, argument, tmp_path, prepare=lambda folder: None):
    found = []
    for name, how in (("peft", []), ("minilora", ["-m", "minilora.peft"])):
        folder = tmp_path / name
        folder.mkdir()
        prepare(folder)
        found.append(run(how, script, argument, folder))
    return found


def save_base(folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_the_standard_qlora_script(bits, tmp_path):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    peft, ours = both("qlora.py", bits, tmp_path, save_base)
    assert ours["loss"] == pytest.approx(peft["loss"], abs=1e-6) and ours["names"] == peft["names"]
    assert ours["resumed"] == 0 and ours["reloaded"] == 0 and ours["class"] == "LlamaForCausalLM"
    assert ours["merged"] <= max(1e-5, 2 * peft["merged"])  # a dense layer here; rounded to four bits again in PEFT


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo", "dpo-adapted", "grpo"])
def test_trainers_of_trl(kind, tmp_path):
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    peft, ours = both("trl_job.py", kind, tmp_path)
    assert ours["losses"] == pytest.approx(peft["losses"], abs=1e-5)
    assert ours["gradients"] == pytest.approx(peft["gradients"], rel=1e-4)
    assert ours["files"] == peft["files"] and len(ours["losses"]) == 3

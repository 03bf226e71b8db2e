"""Loading in parts: every process keeps its rows of the blocks while the weights are read, and trains the bits of one process."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minilora import LoraConfig, quantize_model
from minilora.errors import CheckpointError, StateError
from minilora.hf.load import load_model
from minilora.hf.packed import save_packed
from minilora.hf.places import packing
from minilora.lora.match import match
from minilora.training.processes import Processes
from minilora.training.rows import Rows, why_read_whole
from tests.gguf_files import tiny, write_gguf
from tests.hf import rows_worker as worker
from tests.models import byte_tokenizer, gpt2, llama, lora, moe

SCRIPT = str(Path(worker.__file__))
needs_gloo = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no processes")
NF4 = packing("nf4", True)
GGUF = pytest.param("gguf", marks=pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``{kind: folder}`` of models with a tokenizer: of blocks that three processes cannot share evenly, tied, with biases, packed."""
    place = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 300, "max_position_embeddings": 96, "tie_word_embeddings": False}
    models = {
        "llama": llama(intermediate_size=97, **sizes),
        "gpt2": gpt2(vocab_size=300, n_positions=96, n_embd=32),
        "experts": moe(vocab_size=300, max_position_embeddings=96),
    }
    models["packed"] = quantize_model(llama(intermediate_size=97, **sizes), NF4, ["q_proj", "down_proj", "up_proj"])
    models["packed experts"] = quantize_model(moe(vocab_size=300, max_position_embeddings=96), NF4)
    for kind, model in models.items():
        (save_packed if "packed" in kind else type(model).save_pretrained)(model, place / kind)
        byte_tokenizer().save_pretrained(place / kind)
    if importlib.util.find_spec("gguf"):
        (place / "gguf").mkdir()
        write_gguf(place / "gguf" / "model.gguf", tiny("llama", intermediate_size=160), "Q4_1")
    data = "".join(json.dumps({"prompt": f"a{n}", "completion": "bc" * n}) + "\n" for n in range(1, 12))
    (place / "d.jsonl").write_text(data)
    return place


# ---- while it is read


def processes(size):
    found = [Processes() for _ in range(size)]
    for rank, one in enumerate(found):
        one.rank, one.size = rank, size
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quant", [None, NF4, packing("nf3", False)], ids=["dense", "nf4", "nf3"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "packed", "experts", "packed experts", GGUF])
def test_the_rows_of_all_processes_are_the_weights(folders, monkeypatch, kind, quant, dtype):
    whole = dict(load_model(str(folders / kind), dtype, quant=quant).named_parameters())
    monkeypatch.setattr(Rows, "shard", lambda self, model: None)  # which needs the other processes
    each = [Rows(one, dtype) for one in processes(3)]
    parts = [dict(load_model(str(folders / kind), dtype, quant=quant, rows=rows).named_parameters()) for rows in each]
    for name, wanted in whole.items():
        own = [part[name] for part in parts]
        cut = (name.split(".")[1] in ("layers", "h") and wanted.dim() > 1) or wanted.dtype == torch.uint8
        share = -(-len(wanted) // 3) if cut else len(wanted)
        assert len(own[0]) == share and own[0].untyped_storage().nbytes() == own[0].nbytes, name
        assert torch.equal(torch.cat(own) if cut else own[2], wanted), name
        assert own[0].dtype == wanted.dtype


@pytest.mark.parametrize("quant", [None, NF4], ids=["dense", "nf4"])
def test_a_weight_that_does_not_fit_is_refused_by_name(folders, tmp_path, quant):
    for file in (folders / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 98}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"mlp.\w+_proj.weight: is \[64, 97\], the model wants \[64, 98\]"):
        load_model(str(tmp_path), quant=quant, rows=Rows(processes(2)[0], torch.float32))


def why(model, **fields):
    config = lora("all-linear", **fields)
    return why_read_whole(model, config, match(model, config))


def test_experts_of_a_gguf_file_are_refused(tmp_path):
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "model.gguf", tiny("qwen3moe"), "Q8_0")
    with pytest.raises(CheckpointError, match=r"has experts, which are not shared out .* leave --shard out"):
        load_model(str(path), rows=Rows(processes(2)[0], torch.float32))


def test_what_needs_the_whole_model_is_said():
    model = llama()
    assert why(model) is why(model, modules_to_save=["lm_head"]) is why(model, init_lora_weights="pissa") is None
    assert why(gpt2()) is None  # its head is tied to the embedding, and both are outside of the blocks
    assert why(gpt2(), bias="all") == "bias copies transformer.h.0.ln_1.bias, which lies in a block"
    assert "modules_to_save copies model.layers.0.mlp" in why(model, modules_to_save=["mlp"], exclude_modules=".*mlp.*")
    assert why(model, init_lora_weights="loftq", loftq_config={}) == "loftq packs the dense weights itself"
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(StateError, match="no list of blocks to shard"):
        why_read_whole(torch.nn.Linear(2, 3), LoraConfig(r=2), None)
    found = why_read_whole(model, lora(["q_proj"]), match(model, lora(["q_proj"])))
    assert found == "model.layers.0.mlp.up_proj.weight and model.layers.1.mlp.up_proj.weight are one weight"


# ---- a job

KINDS = {
    "nf4": ("llama", {}),
    "dense": ("llama", {"quant": "none"}),
    "nf3, recomputed": ("llama", {"quant": "nf3", "training": {"gradient_checkpointing": True}}),
    "bf16": ("llama", {"dtype": "bfloat16"}),
    "tied, with biases": ("gpt2", {}),
    "packed folder": ("packed", {}),
    **({"GGUF file": ("gguf", {})} if importlib.util.find_spec("gguf") else {}),
    "pissa": ("llama", {"lora": {"init_lora_weights": "pissa"}}),
    "olora, packed": ("packed", {"lora": {"init_lora_weights": "olora"}}),
    "dora": ("llama", {"lora": {"use_dora": True}}),
    "experts": ("experts", {}),
    "dense experts": ("experts", {"quant": "none"}),
    "packed experts": ("packed experts", {"lora": {"use_dora": True}}),
    "experts left alone": ("experts", {"quant": "none", "lora": {"target_modules": ["q_proj"]}}),
    "tables": ("llama", {"lora": {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]}}),
}
WHOLE = {
    "biases": ("gpt2", {"lora": {"bias": "all"}}),
    "loftq": ("llama", {"quant": "none", "lora": {"init_lora_weights": "loftq"}}),
}


def run(place, folders, kinds, size, shard, **more):
    """What ``size`` processes say of these jobs, by rank."""
    jobs = {
        name: {"model": str(folders / model), "data": str(folders / "d.jsonl"), "out": str(place / name), "shard": shard,
               "prompts": ["why", "ab"], "max_new_tokens": 5, "dtype": "float32", "eval_share": 0.2, **fields, **more}
        for name, (model, fields) in kinds.items()
    }  # fmt: skip
    place.mkdir(exist_ok=True)
    said = place / "said.jsonl"
    said.unlink(missing_ok=True)
    start = (
        [sys.executable]
        if size == 1
        else [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    )
    paths = os.pathsep.join([str(Path(SCRIPT).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*start, SCRIPT, str(said), json.dumps(jobs)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return sorted(map(json.loads, said.read_text().splitlines()), key=lambda line: line["rank"])


def sha(folder):
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def check(tmp_path, folders, kinds, size, shares):
    (alone,) = run(tmp_path / "alone", folders, kinds, 1, False)
    every = run(tmp_path / "shards", folders, kinds, size, True)
    assert len(every) == size
    for name in kinds:
        first = every[0][name]
        assert "error" not in first, (name, first)
        assert (first["answers"], first["losses"]) == (alone[name]["answers"], alone[name]["losses"]), name
        assert all(pair["before"] for pair in first["answers"]) and len(first["losses"]) == 3
        for file in ("adapter_model.safetensors", "minilora.json"):
            assert (tmp_path / "alone" / name / file).read_bytes() == (tmp_path / "shards" / name / file).read_bytes()
        for one in every:
            low, high = shares
            assert low < one[name]["kept"] <= high, (name, one[name]["kept"])
            assert any("reads the whole model" in line for line in one[name]["said"]) is (low > 0.9), name


@needs_gloo
def test_two_processes_load_in_parts_and_train_the_bits_of_one(tmp_path, folders):
    check(tmp_path, folders, {"nf4": KINDS["nf4"]}, 2, (0.4, 0.55))


@needs_gloo
@pytest.mark.parametrize("other", [{"max_new_tokens": 9}, {"prompts": ["why"]}, {"quant": "nf3"}], ids=str)
def test_a_process_that_is_told_otherwise_is_refused_before_a_model_is_loaded(tmp_path, folders, other):
    """In shards one that asks longer than the others would wait for them for ever."""
    every = run(tmp_path, folders, {"nf4": ("llama", {"second": other})}, 2, True)
    for one in every:
        assert one["nf4"]["error"].startswith(
            f"process 1 of 2 has another {next(iter(other))} than process 0; give all"
        )
        assert "kept" not in one["nf4"] and not (tmp_path / "nf4").exists()


@needs_gloo
@pytest.mark.slow
def test_every_kind_of_job_loads_in_parts_and_trains_the_bits_of_one(tmp_path, folders):
    check(tmp_path, folders, KINDS, 2, (0.4, 0.55))


@needs_gloo
@pytest.mark.slow
def test_what_needs_the_whole_model_gets_it_says_so_and_trains_the_same_bits(tmp_path, folders):
    check(tmp_path, folders, WHOLE, 2, (0.99, 1.0))


@needs_gloo
@pytest.mark.slow
def test_a_run_in_parts_goes_on_alone_and_the_other_way_round(tmp_path, folders):
    kinds = {"nf4": ("llama", {"training": {"keep_checkpoints": 3}})}
    run(tmp_path / "whole", folders, kinds, 1, False)
    for name, first, then in (("a", (2, True), (1, False)), ("b", (1, False), (2, True))):
        run(tmp_path / name, folders, kinds, *first)
        place = tmp_path / name / "nf4"
        for left in ("adapter_model.safetensors", "adapter_config.json", "minilora.json", "report.html"):
            (place / left).unlink()
        for last in (place / "checkpoint-3", place / "checkpoint-2"):
            shutil.rmtree(last)
        (line, *_) = run(tmp_path / name, folders, kinds, *then, resume=True)
        assert any("going on after step 1" in said for said in line["nf4"]["said"])
        assert sha(place) == sha(tmp_path / "whole" / "nf4")

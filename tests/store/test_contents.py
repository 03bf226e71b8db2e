"""What a folder tells without its base model: layers, ranks and scalings, norms that are those of the formed updates, and who takes it."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from minilora import LoraConfig, inject, save_adapter
from minilora.errors import StateError
from minilora.export.folders import export_adapter, export_folder
from minilora.export.servers import servers_of
from minilora.lora.slots import adapters_of
from minilora.store.adapter_files import read_adapter
from minilora.store.contents import layers_in, others_in, update_norm
from tests import models
from tests.mixtures import mixture

pytest.importorskip("transformers")


def saved(folder, variant=None, train=True, model=None, **fields):
    """``(stored, model)`` of an adapter of a small Llama with trained values."""
    model = models.llama() if model is None else model
    fields = {"r": 3, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], **fields}
    inject(model, LoraConfig(**fields), variant=variant)
    if train:
        models.randomize(model)
    save_adapter(model, folder)
    return read_adapter(folder), model


def formed(model):
    """Norm by path of every update, formed."""
    values = adapters_of(model).named("default")
    return {path: float(value.delta_weight().detach().double().norm()) for path, value in values.items()}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 7}},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_norms_are_those_of_the_formed_updates(tmp_path, fields):
    stored, model = saved(tmp_path / "a", **fields)
    layers = {layer.path: layer for layer in layers_in(stored)}
    wanted = formed(model)
    assert layers.keys() == wanted.keys() and len(wanted) >= 3
    for path, layer in layers.items():
        assert layer.norm == pytest.approx(wanted[path], rel=1e-5)
        value = adapters_of(model).named("default")[path]
        assert (layer.r, layer.scaling) == (value.r, pytest.approx(value.scaling)) and not layer.untrained


def test_the_norm_of_a_convolution_of_groups():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(6, 2, 3, generator=generator), torch.randn(8, 3, 1, generator=generator)
    whole = sum((B[4 * g : 4 * g + 4, :, 0] @ A[3 * g : 3 * g + 3].flatten(1)).square().sum() for g in range(2))
    assert update_norm(A, B, -4.0) == pytest.approx(4 * math.sqrt(whole), rel=1e-5)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_a_norm_that_the_base_decides_is_left_open(tmp_path, fields):
    stored, _ = saved(tmp_path / "a", **fields)
    layers = layers_in(stored)
    assert len(layers) == 4 and all(layer.norm is None and not layer.untrained for layer in layers)


def test_what_a_start_from_data_began_with_is_taken_away(tmp_path):
    stored, _ = saved(tmp_path / "a")
    began = {key: tensor.clone() for key, tensor in stored.tensors.items()}
    for key, tensor in began.items():
        stored.tensors[key.replace("lora_A.weight", "lora_start_A").replace("lora_B.weight", "lora_start_B")] = tensor
    assert [layer.norm for layer in layers_in(stored)] == pytest.approx([0.0] * 4, abs=1e-4)


def test_an_adapter_that_has_learnt_nothing_says_so(tmp_path):
    stored, _ = saved(tmp_path / "a", train=False)
    assert [(layer.norm, layer.untrained) for layer in layers_in(stored)] == [(0.0, True)] * 4


def test_what_is_no_update_is_counted_by_its_module(tmp_path):
    stored, model = saved(tmp_path / "a", modules_to_save=["lm_head"], bias="none")
    assert others_in(stored) == {"lm_head": model.config.vocab_size * 64}
    assert {layer.kind for layer in layers_in(stored)} == {"q_proj", "down_proj"}


# ---- who takes it


def takes(stored):
    return {server.name: server.takes for server in servers_of(stored, Path("a"))}


EVERYWHERE = {"PEFT": "as it is", "vLLM": "as it is", "llama.cpp": "as it is", "MLX": "after export"}


@pytest.mark.parametrize(
    ("fields", "other"),
    [
        ({}, {}),
        ({"use_rslora": True}, {"llama.cpp": "after export"}),
        ({"rank_pattern": {"q_proj": 5}}, {"vLLM": "after export"}),
        ({"alpha_pattern": {"q_proj": 5}}, {"vLLM": "after export", "llama.cpp": "after export"}),
        ({"init_lora_weights": "pissa"}, {"vLLM": "after export", "llama.cpp": "after export"}),
        ({"use_dora": True}, dict.fromkeys(("vLLM", "llama.cpp"), "no")),
        ({"modules_to_save": ["lm_head"]}, dict.fromkeys(("vLLM", "llama.cpp", "MLX"), "no")),
        ({"target_modules": ["q_proj", "lm_head"]}, {"vLLM": "after export", "llama.cpp": "after export"}),
    ],
    ids=str,
)
def test_who_takes_it(tmp_path, fields, other):
    stored, _ = saved(tmp_path / "a", **fields)
    assert takes(stored) == EVERYWHERE | other
    for server in servers_of(stored, Path("a")):
        assert server.takes != "no" or "minilora merge" in server.why


def test_mlx_wants_the_base_of_what_stands_outside_the_blocks(tmp_path):
    stored, _ = saved(tmp_path / "a", model=models.mlp(), target_modules=["first"])
    assert takes(stored) == EVERYWHERE
    (said,) = [server.why for server in servers_of(stored, Path("a")) if server.name == "MLX"]
    assert "--model BASE: first: mlx has one module for a head and an embedding that are tied" in said


def test_a_rank_that_vllm_never_takes(tmp_path):
    stored, _ = saved(tmp_path / "a", r=600)
    assert takes(stored) == EVERYWHERE | {"vLLM": "no"}


def test_a_variant_that_peft_has_no_word_for(tmp_path):
    stored, _ = saved(tmp_path / "a", variant="vera")  # in PEFT's own layout of it
    assert takes(stored)["PEFT"] == "as it is" and takes(stored)["vLLM"] == "after export"
    before = dataclasses.replace(stored, config=LoraConfig(target_modules=["q_proj"]))  # as it was once saved
    assert takes(before)["PEFT"] == "no" and takes(before)["vLLM"] == "after export"
    small, _ = saved(tmp_path / "c", variant="lora_xs")
    assert takes(small)["PEFT"] == "no" and takes(small)["vLLM"] == "after export"
    fixed, _ = saved(tmp_path / "b", variant="lora_fa")
    assert takes(fixed)["PEFT"] == "as it is"


@pytest.mark.parametrize("target", ["vllm", "llama.cpp", "mlx"])
@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"use_dora": True}, {"target_modules": ["lm_head"]}], ids=str
)
def test_it_agrees_with_what_export_does(tmp_path, target, fields):
    stored, _ = saved(tmp_path / "a", **fields)
    said = next(server for server in servers_of(stored, Path("a")) if server.name.lower() == target)
    try:
        export_folder(tmp_path / "a", tmp_path / "out", target)
        wrote = True
    except Exception:
        wrote = False
    needs_base = said.takes != "as it is" and any(base in said.why for base in ("--model", "--base"))
    assert wrote is (said.takes != "no" and not needs_base)


@pytest.mark.parametrize(("r", "wanted"), [(3, 8), (8, 8), (9, 16), (40, 64)])
def test_vllm_is_told_a_rank_that_it_takes(tmp_path, r, wanted):
    stored, _ = saved(tmp_path / "a", r=r, base_model_name_or_path="owner/base")
    (said,) = [server.why for server in servers_of(stored, Path("runs/mine")) if server.name == "vLLM"]
    assert said == f"vllm serve owner/base --enable-lora --max-lora-rank {wanted} --lora-modules mine=runs/mine"


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_parameters": BOTH},
        {"target_parameters": ["down_proj"], "target_modules": ["q_proj"]},
        {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": r".*\.[qv]_proj"},
        {"target_parameters": ["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"], "use_rslora": True},
        {
            "target_parameters": [*BOTH, "mlp.gate.weight"],
            "rank_pattern": {"experts.down_proj": 5},
            "alpha_pattern": {"gate": 7},
        },
        {"target_parameters": BOTH, "init_lora_weights": "orthogonal", "r": 4},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_experts_and_routers_are_told_by_their_projections(tmp_path, fields):
    stored, model = saved(tmp_path / "a", model=mixture(), **{"target_modules": None, **fields})
    layers, wanted = {layer.path: layer for layer in layers_in(stored)}, formed(model)
    assert layers.keys() == wanted.keys()
    assert not others_in(stored)
    for path, layer in layers.items():
        value = adapters_of(model).named("default")[path]
        assert layer.norm == pytest.approx(wanted[path], rel=1e-5)
        assert (layer.r, layer.scaling) == (value.r, pytest.approx(value.scaling))
        assert layer.experts == (6 if "experts" in path else 0)


@pytest.mark.parametrize("names", [BOTH, ["down_proj"], ["mlp.gate.weight"]], ids=str)
def test_no_other_program_is_promised_experts_or_routers(tmp_path, names):
    stored, model = saved(tmp_path / "a", model=mixture(), target_modules=["q_proj"], target_parameters=names)
    takes = {server.name: server for server in servers_of(stored, tmp_path / "a")}
    assert takes.pop("PEFT").takes == "as it is"
    router = names[0].endswith("weight")
    bases = (
        {} if router else {"mlx": "--model BASE", "llama.cpp": "--base SERVED.gguf"}
    )  # and of some architectures only
    for target, server in zip(("vllm", "llama.cpp", "mlx"), takes.values(), strict=True):
        if target in bases:
            assert server.takes == "after export" and bases[target] in server.why
            assert "is a projection of experts" in server.why
        else:
            assert server.takes == "no" and "minilora merge" in server.why
        ways = [
            lambda t: export_folder(tmp_path / "a", tmp_path / "b", t),
            lambda t: export_adapter(model, tmp_path / "b", t),
        ]
        for export in ways[: 1 if target == "mlx" and not router else 2]:
            with pytest.raises(StateError, match=r"experts|gate") as caught:
                export(target)
            assert "\n" not in str(caught.value) and not (tmp_path / "b").exists()


def test_peft_takes_no_dropout_on_experts(tmp_path):
    stored, _ = saved(tmp_path / "a", model=mixture(), target_modules=None, target_parameters=BOTH, lora_dropout=0.1)
    assert servers_of(stored, tmp_path / "a")[0].takes == "no"

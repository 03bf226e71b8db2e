"""Exports for MLX in mlx-lm itself: its logits with the adapter are minilora's own in fp32, over architectures and kinds of adapters."""

import json

import pytest
import torch

from minilora import LoraConfig, inject, save_adapter
from minilora.errors import StateError
from minilora.export.folders import export_adapter, export_folder
from minilora.hf.older_readers import save_dense
from tests.architectures import tiny
from tests.models import randomize

transformers = pytest.importorskip("transformers")

IDS = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(1))
MORE = {"gpt_neox": {"intermediate_size": 256}, "qwen3_moe": {"head_dim": 16}, "gpt2": {"n_inner": None}}
ARCHITECTURES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "starcoder2", "stablelm", "olmo2",
    "gpt2", "gpt_neox", "granite", "smollm3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe",
)  # fmt: skip
TIED = ("gemma", "gemma2", "gpt2")  # mlx-lm has no head of its own for these


def model_of(model_type, tied=None):
    config = tiny.tiny_config(model_type, MORE.get(model_type))
    config.tie_word_embeddings = model_type in TIED if tied is None else tied
    model = tiny.drawn(tiny.model_class(config)(config).eval())
    if config.tie_word_embeddings:
        model.tie_weights()
    return model


def loaded(folder, adapter=None):
    utils, tuner = pytest.importorskip("mlx_lm.utils"), pytest.importorskip("mlx_lm.tuner.utils")
    model, _ = utils.load_model(folder)
    return model if adapter is None else tuner.load_adapters(model, str(adapter))


def logits_of(model, ids=IDS):
    mx = pytest.importorskip("mlx.core")
    return torch.tensor(memoryview(model(mx.array(ids.tolist())).astype(mx.float32)).tolist())


@torch.no_grad()
def own(model):
    return model(input_ids=IDS, use_cache=False).logits.float()


def compare(model, tmp_path, export=export_adapter, variant=None, **fields):
    """The adapter moves the logits, and in mlx-lm they are the same."""
    save_dense(model, tmp_path / "base")
    before = own(model)
    randomize(inject(model, LoraConfig(**{"r": 3, "lora_alpha": 5, **fields}), variant=variant))
    wanted = own(model)
    export(model, tmp_path / "out", "mlx")
    got = logits_of(loaded(tmp_path / "base", tmp_path / "out"))
    moved = (wanted - before).abs().max()
    assert moved > 0.1
    assert (got - wanted).abs().max() < 2e-3 * max(1, moved)


FEATURES = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 11}},
    "pissa": {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "olora"},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora, rslora, patterns": {"target_modules": ["q_proj", "o_proj"], "use_dora": True, "use_rslora": True, "rank_pattern": {"o_proj": 2}},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "head and embedding": {"target_modules": ["embed_tokens", "lm_head"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_every_kind_of_adapter(tmp_path, feature):
    compare(model_of("llama"), tmp_path, **FEATURES[feature])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["vera", "lora_fa", "lora_xs"])
def test_every_variant(tmp_path, variant):
    compare(model_of("qwen2"), tmp_path, variant=variant, target_modules=["q_proj", "down_proj"])


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture(tmp_path, model_type):
    compare(model_of(model_type), tmp_path, target_modules="all-linear")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "gemma3_text"])
def test_dora_on_other_architectures(tmp_path, model_type):
    compare(model_of(model_type), tmp_path, target_modules="all-linear", use_dora=True)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]], ids=str)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_experts(tmp_path, model_type, names):
    entries = [f"experts.{name}" for name in names]
    compare(model_of(model_type), tmp_path, target_modules=["q_proj"], target_parameters=entries)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gemma", "llama", "gpt2"])
def test_a_tied_head_that_follows_its_embedding(tmp_path, model_type):
    name = "wte" if model_type == "gpt2" else "embed_tokens"
    compare(model_of(model_type, tied=True), tmp_path, target_modules=[name], ensure_weight_tying=True)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_a_folder_alone(tmp_path, fields):
    def export(model, out, target):
        save_adapter(model, tmp_path / "adapter")
        export_folder(tmp_path / "adapter", out, target)

    compare(model_of("qwen3"), tmp_path, export, target_modules="all-linear", **fields)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_a_folder_alone_of_an_architecture_with_other_names(tmp_path, model_type):
    def export(model, out, target):
        save_adapter(model, tmp_path / "adapter")
        export_folder(tmp_path / "adapter", out, target)

    compare(model_of(model_type), tmp_path, export, target_modules="all-linear")


def test_experts_of_an_architecture_that_was_not_tried(tmp_path):
    model = model_of("gpt_oss")
    inject(model, LoraConfig(r=3, target_modules=[], target_parameters=["experts.down_proj"]))
    with pytest.raises(StateError, match="experts of gpt_oss have not been tried in mlx"):
        export_adapter(model, tmp_path / "out", "mlx")
    assert not (tmp_path / "out").exists()


def test_a_zero_row_under_dora_is_refused(tmp_path):
    """mlx-lm divides by its norm."""
    model = model_of("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3] = 0
    inject(model, LoraConfig(r=3, use_dora=True, target_modules=["down_proj"]))
    with pytest.raises(StateError, match=r"layers\.1\.mlp\.down_proj: a row of its weight is zero"):
        export_adapter(model, tmp_path / "out", "mlx")


def test_dora_on_an_embedding_is_refused(tmp_path):
    """Of minilora, as of PEFT, it goes by columns; mlx-lm's by rows."""
    model = model_of("llama")
    inject(model, LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(StateError, match="embed_tokens"):
        export_adapter(model, tmp_path / "out", "mlx")


@pytest.mark.slow
def test_a_key_that_mlx_does_not_know_is_no_silent_loss(tmp_path):
    """What the comparison above relies on: mlx-lm refuses names that it has not."""
    model = model_of("llama")
    save_dense(model, tmp_path / "base")
    inject(model, LoraConfig(r=3, target_modules=["q_proj"]))
    export_adapter(model, tmp_path / "out", "mlx")
    config = tmp_path / "out" / "adapter_config.json"
    content = json.loads(config.read_text())
    content["lora_parameters"]["keys"] = ["self_attn.k_proj"]
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not an adapter parameter"):
        loaded(tmp_path / "base", tmp_path / "out")

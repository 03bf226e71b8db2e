"""A merged folder says in older keys what transformers 5 says in ``rope_parameters``; transformers reads it as before, mlx-lm too."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from minilora.hf.older_readers import _HEAD_APART, _HEAD_TIED, _OTHERWISE, save_dense, write_older_keys
from tests import models
from tests.architectures import tiny

transformers = pytest.importorskip("transformers")

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default"}


def written(config, folder):
    """What stands in ``config.json`` afterwards, and what was lost."""
    config.save_pretrained(folder)
    lost = write_older_keys(folder)
    return json.loads((folder / "config.json").read_text()), lost


def test_plain_rotary_embeddings(tmp_path):
    content, lost = written(models.llama_config(rope_parameters={**PLAIN, "rope_theta": 1234.5}), tmp_path)
    assert (content["rope_theta"], content["rope_scaling"], lost) == (1234.5, None, [])
    assert content["rope_parameters"] == {**PLAIN, "rope_theta": 1234.5}


def test_a_scaling_stands_apart_from_its_base(tmp_path):
    content, _ = written(models.llama_config(rope_parameters=dict(LLAMA3)), tmp_path)
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    assert content["rope_theta"] == 5e5 and content["rope_scaling"] == scaling


def test_a_type_with_names_of_its_own(tmp_path):
    rope = {**PLAIN, "rope_theta": 777.0, "partial_rotary_factor": 0.5}
    content, _ = written(transformers.GPTNeoXConfig(rope_parameters=rope), tmp_path)
    assert (content["rotary_emb_base"], content["rotary_pct"]) == (777.0, 0.5)
    (tmp_path / "b").mkdir()
    content, _ = written(transformers.GPT2Config(n_positions=48), tmp_path / "b")
    assert content["n_ctx"] == 48
    (tmp_path / "c").mkdir()
    content, _ = written(transformers.Qwen3MoeConfig(num_experts=5), tmp_path / "c")
    assert content["num_experts"] == content["num_local_experts"] == 5


def gemma3(full, sliding, kinds):
    rope = {"full_attention": {**PLAIN, **full}, "sliding_attention": {**PLAIN, **sliding}}
    layers = [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in kinds]
    return transformers.Gemma3TextConfig(num_hidden_layers=len(kinds), layer_types=layers, rope_parameters=rope)


def test_layers_of_two_kinds(tmp_path):
    content, lost = written(gemma3({"rope_theta": 9e4}, {"rope_theta": 3e3}, "ssfssf"), tmp_path)
    assert (content["rope_theta"], content["rope_local_base_freq"], content["sliding_window_pattern"]) == (9e4, 3e3, 3)
    assert content["rope_scaling"] is None and lost == []


def test_what_no_older_key_can_say_is_told(tmp_path):
    (tmp_path / "a").mkdir()
    _, lost = written(gemma3({"rope_theta": 9e4}, {"rope_theta": 3e3}, "sfsssf"), tmp_path / "a")
    assert lost == ["layer_types, which follow no sliding_window_pattern"]
    (tmp_path / "b").mkdir()
    slow = {"rope_theta": 3e3, "rope_type": "linear", "factor": 2.0}
    content, lost = written(gemma3({"rope_theta": 9e4}, slow, "sfsf"), tmp_path / "b")
    assert lost == ["rope_parameters of full_attention and sliding_attention"] and "rope_theta" not in content


def test_sub_configs_are_written_too(tmp_path):
    config = transformers.Gemma3Config(text_config=gemma3({"rope_theta": 9e4}, {"rope_theta": 3e3}, "sf").to_dict())
    content, _ = written(config, tmp_path)
    assert content["text_config"]["rope_theta"] == 9e4 and content["text_config"]["rope_local_base_freq"] == 3e3


def test_a_key_that_transformers_would_read_otherwise_is_left_out(tmp_path, monkeypatch):
    from minilora.hf import older_readers

    monkeypatch.setattr(
        older_readers, "older_keys", lambda config, lost: {"rope_scaling": {"rope_theta": 5.0, **PLAIN}}
    )
    config = models.llama_config(rope_parameters={**PLAIN, "rope_theta": 1234.5})
    content, lost = written(config, tmp_path)
    assert "rope_scaling" not in content and "transformers itself" in lost[0]


@pytest.mark.slow
def test_transformers_reads_every_type_as_before(tmp_path):
    kinds, differ = transformers.CONFIG_MAPPING, []
    for name in sorted(kinds.keys()):
        folder = tmp_path / name
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                kinds[name]().save_pretrained(folder)
                before = kinds[name].from_pretrained(folder)
            except Exception:  # a type whose default configuration does not stand
                continue
            lost = write_older_keys(folder)
            after = kinds[name].from_pretrained(folder)
        assert getattr(after, "rope_parameters", None) == getattr(before, "rope_parameters", None), name
        differ += [name] * any("transformers itself" in what for what in lost)
    assert differ == ["beam"]  # its own keys mean something else


# ---- in mlx-lm


def in_mlx(folder, ids):
    """Logits of ``ids [1, T]`` in mlx-lm."""
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    model, _ = utils.load_model(folder)
    return torch.tensor(memoryview(model(mx.array(ids.tolist())).astype(mx.float32)).tolist())


IDS = torch.randint(3, 60, (1, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_gpt2_has_the_names_that_its_published_files_have(tmp_path):
    model = models.gpt2()
    assert save_dense(model, tmp_path) == []
    torch.testing.assert_close(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits
    )
    torch.testing.assert_close(in_mlx(tmp_path, IDS), model(IDS).logits, rtol=1e-5, atol=1e-4)


def test_gpt2_with_a_head_of_its_own_keeps_its_names(tmp_path):
    model = models.gpt2(tie_word_embeddings=False)
    save_dense(model, tmp_path)
    torch.testing.assert_close(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits
    )


RIGHT = (
    "afmoe", "deepseek_v3", "ernie4_5", "gemma3_text", "glm4", "granite", "helium", "hunyuan_v1_dense", "llama", "mistral", "mixtral",
    "mellum", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip


def moved(rope):
    """Every base something that nobody takes by default."""
    for name, value in rope.items():
        if isinstance(value, dict):
            moved(value)
        elif name == "rope_theta":
            rope[name] = value / 37 + 3


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*RIGHT, *_OTHERWISE])
def test_mlx_computes_what_transformers_computes(tmp_path, model_type):
    config = tiny.tiny_config(model_type)
    moved(getattr(config, "rope_parameters", None) or {})
    if hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False
    model = tiny.drawn(tiny.model_class(config)(config).eval())
    told = save_dense(model, tmp_path)
    assert bool(told) is (model_type in _OTHERWISE)
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
    apart = (in_mlx(tmp_path, IDS) - wanted).abs().max() / wanted.abs().max()
    assert (apart > 1e-3) if told else (apart < 1e-3)


HEADS = [*_HEAD_APART, *(kind for kind in _HEAD_TIED if kind != "gpt2"), "llama", "gemma3_text", "olmoe"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "model_type",
    [pytest.param(kind, marks=() if kind in ("phi", "gemma", "llama") else pytest.mark.slow) for kind in HEADS],
)
def test_a_head_that_mlx_does_not_load_is_said(tmp_path, model_type, tied):
    config = tiny.tiny_config(model_type, {"intermediate_size": 256} if model_type == "gpt_neox" else None)
    config.tie_word_embeddings = tied
    model = tiny.drawn(tiny.model_class(config)(config).eval())
    if tied:
        model.tie_weights()
    said = [sentence for sentence in save_dense(model, tmp_path) if "does not load it" in sentence]
    assert bool(said) is (model_type in (_HEAD_APART if tied else _HEAD_TIED))
    pytest.importorskip("mlx_lm")
    if said:
        with pytest.raises(ValueError, match=r"(lm_head|embed_out)\.weight"):
            in_mlx(tmp_path, IDS)
    else:
        in_mlx(tmp_path, IDS)


@pytest.mark.slow
def test_without_the_older_keys_mlx_is_silently_wrong(tmp_path):
    """What the keys are for; if mlx-lm learns the new ones, this says so."""
    model = models.llama(rope_parameters={**PLAIN, "rope_theta": 60.0}, initializer_range=0.3)
    model.save_pretrained(tmp_path)
    assert (in_mlx(tmp_path, IDS) - model(IDS).logits).abs().max() > 1e-2
    write_older_keys(tmp_path)
    torch.testing.assert_close(in_mlx(tmp_path, IDS), model(IDS).logits, rtol=1e-5, atol=1e-4)


def test_what_has_no_config_is_saved_as_it_saves_itself(tmp_path):
    def save(folder):
        (folder / "config.json").write_text('{"model_type": "of nobody"}')

    assert save_dense(SimpleNamespace(save_pretrained=save), tmp_path) == []
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "of nobody"}

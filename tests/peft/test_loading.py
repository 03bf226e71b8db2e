"""Loading by PEFT's arguments: tensors of another shape, old names, ids of the Hub; and tables of a grown vocabulary with token rows."""

import json
import shutil
from typing import ClassVar

import pytest
import torch
from torch import nn

from minilora.errors import CheckpointError, ConfigError, KindError, MissingPackageError
from minilora.files import hub
from minilora.peft import (
    LoraConfig,
    LoraRuntimeConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    set_peft_model_state_dict,
)
from minilora.peft.utils.save_and_load import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
)
from minilora.store.adapter_files import SEAL_FILE
from tests.models import finished, llama, lora, mlp, randomize

IDS = torch.tensor([[3, 9, 1, 65]])


class Words(nn.Module):
    def __init__(self, count=23):
        super().__init__()
        self.embed, self.head = nn.Embedding(count, 12), nn.Linear(12, 5)

    def forward(self, ids):
        return self.head(self.embed(ids))


def words(count=23):
    torch.manual_seed(0)
    return finished(Words(count))


def unsealed(folder):
    """As PEFT writes it: nothing says on which base it was trained."""
    (folder / SEAL_FILE).unlink()


def test_a_tensor_of_another_shape_is_left_out_and_named(tmp_path):
    randomize(get_peft_model(words(), lora(["embed", "head"]))).save_pretrained(tmp_path)
    unsealed(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"size mismatch: .*lora_embedding_A is \[3, 23\], config and model want \[3, 25\]"
    ):
        PeftModel.from_pretrained(words(25), tmp_path)
    with pytest.warns(
        UserWarning, match=r"ignored because you passed `ignore_mismatched_sizes=True`: \S*embed.lora_embedding_A$"
    ):
        model = PeftModel.from_pretrained(words(25), tmp_path, ignore_mismatched_sizes=True)
    tensors = get_peft_model_state_dict(model)
    stored = get_peft_model_state_dict(PeftModel.from_pretrained(words(), tmp_path))
    for key, tensor in tensors.items():
        assert torch.equal(tensor, stored[key]) is not key.endswith("embed.lora_embedding_A")
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        report = model.load_adapter(tmp_path, "other", ignore_mismatched_sizes=True)
    assert report.mismatched_keys == ["base_model.model.embed.lora_embedding_A"] and not report.missing_keys
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes"):
        set_peft_model_state_dict(model, stored, ignore_mismatched_sizes=True)
    with pytest.raises(CheckpointError, match="missing"):  # the flag is for shapes alone
        set_peft_model_state_dict(model, dict(list(stored.items())[:1]), ignore_mismatched_sizes=True)


class New(nn.Module):
    """As transformers moves layers from one release to the next, and says how old names are read."""

    _checkpoint_conversion_mapping: ClassVar[dict[str, str]] = {"^first": "inner.first"}

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return self.inner(x)


def test_a_models_own_mapping_of_old_names(tmp_path):
    old = randomize(get_peft_model(mlp(), lora(["first"]))).eval()
    old.save_pretrained(tmp_path)
    unsealed(tmp_path)
    x = torch.randn(2, 12)
    torch.testing.assert_close(PeftModel.from_pretrained(New().eval(), tmp_path)(x), old(x))
    with pytest.raises(CheckpointError, match="missing"):
        PeftModel.from_pretrained(New(), tmp_path, key_mapping={"^nothing": ""})


def grown(folder):
    """A Llama from a folder, with three more tokens, whose rows are drawn at random."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.resize_token_embeddings(67)
    return model


def test_a_grown_vocabulary_of_which_some_rows_train(tmp_path):
    """The rows that do not train are in no checkpoint either: the file brings the table, under PEFT's name."""
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(grown(tmp_path / "base"), lora(["v_proj"], trainable_token_indices=[3, 65]))
    wanted = randomize(model).eval()(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    keys = {key.removeprefix("base_model.model.") for key in get_peft_model_state_dict(model)}
    assert "model.embed_tokens.token_adapter.base_layer.weight" in keys and "lm_head.weight" in keys
    again = PeftModel.from_pretrained(grown(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(again(IDS).logits, wanted)
    model = get_peft_model(llama(), lora(["v_proj"], trainable_token_indices=[3, 5]))  # nothing has grown
    assert not [key for key in get_peft_model_state_dict(model) if "base_layer" in key or "lm_head" in key]


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True` as the embedding layer has been resized")
def test_peft_and_minilora_read_each_others_grown_tables(tmp_path):
    peft = pytest.importorskip("peft")
    llama().save_pretrained(tmp_path / "base")
    fields = {"r": 3, "lora_alpha": 12, "target_modules": ["v_proj"], "trainable_token_indices": [3, 65]}
    theirs = randomize(peft.get_peft_model(grown(tmp_path / "base"), peft.LoraConfig(**fields))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = PeftModel.from_pretrained(grown(tmp_path / "base"), tmp_path / "theirs")
    torch.testing.assert_close(loaded(IDS).logits, theirs(IDS).logits)
    ours = randomize(get_peft_model(grown(tmp_path / "base"), LoraConfig(**fields)), 2).eval()
    ours.save_pretrained(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(grown(tmp_path / "base"), tmp_path / "ours").eval()
    torch.testing.assert_close(loaded(IDS).logits, ours(IDS).logits)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the Hub with an adapter and its base in it."""
    pytest.importorskip("huggingface_hub")

    def put(name, folder):
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / "0" / "")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0")

    llama().save_pretrained(tmp_path / "base")
    put("owner/base", tmp_path / "base")
    get_peft_model(llama(), lora(["v_proj"])).save_pretrained(tmp_path / "adapter")
    put("owner/adapter", tmp_path / "adapter")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_config_by_its_id(cache):
    for where in ({}, {"revision": "main", "token": "t"}):
        config = PeftConfig.from_pretrained("owner/adapter", cache_dir=str(cache), **where)
        assert (config.r, config.lora_alpha, config.revision) == (3, 12, None)
    assert LoraConfig.from_pretrained("owner/adapter", cache_dir=str(cache), r=5).r == 5
    with pytest.raises(CheckpointError, match="the Hub does not give an adapter of that id"):
        LoraConfig.from_pretrained("owner/none", cache_dir=str(cache))


def test_without_huggingface_hub_an_id_is_no_folder(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="owner/none: no such folder, and huggingface_hub is not installed"):
        LoraConfig.from_pretrained("owner/none")
    assert hub.cached("owner/none", "config.json") is None


def test_a_base_from_the_cache_whose_vocabulary_grew(cache, monkeypatch):
    found = cache / "models--owner--base" / "snapshots" / "0" / "config.json"
    monkeypatch.setattr("minilora.peft.folders.cached", lambda name, file: found if name == "owner/base" else None)
    model = grown(found.parent)
    model.name_or_path = "owner/base"
    get_peft_model(model, lora(["v_proj"])).save_pretrained(cache / "adapter")
    again = grown(found.parent)
    again.name_or_path = "owner/base"
    PeftModel.from_pretrained(again, cache / "adapter")  # with the table; without it the new rows are other ones
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_what_is_cached_is_found_without_a_network(cache, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda name, file: (
            str(cache / "models--owner--base" / "snapshots" / "0" / file) if name == "owner/base" else None
        ),
    )
    assert hub.cached("owner/base", "config.json").name == "config.json"
    assert hub.cached("owner/none", "config.json") is None
    assert hub.cached(str(cache), "config.json") is None and hub.cached(None, "config.json") is None


def test_a_file_that_is_no_adapters_config(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"foo": "bar", "r": 4}')
    with pytest.raises(KindError, match=r"is missing required keys: \{'peft_type'\}.*adapter_config\.json"):
        LoraConfig.from_pretrained(tmp_path)


def test_settings_of_the_run_are_in_no_file(tmp_path):
    config = LoraConfig(r=3, runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True))
    assert config.runtime_config.ephemeral_gpu_offload is True
    config.save_pretrained(tmp_path)
    again = LoraConfig.from_pretrained(tmp_path)
    assert again.runtime_config.ephemeral_gpu_offload is False and again.r == 3
    again.runtime_config.ephemeral_gpu_offload = True
    assert again.runtime_config.ephemeral_gpu_offload is True and "runtime_config" not in again.to_dict()
    said = json.loads((tmp_path / "adapter_config.json").read_text()) | {
        "runtime_config": {"ephemeral_gpu_offload": True}
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    assert "runtime_config" not in LoraConfig.from_json_file(tmp_path / "adapter_config.json")
    assert LoraConfig.from_pretrained(tmp_path).runtime_config == LoraRuntimeConfig()
    with pytest.raises(ConfigError, match="ephemeral_gpu_offload=1"):
        LoraRuntimeConfig(ephemeral_gpu_offload=1)


def test_names_that_differ_are_what_torch_would_raise(tmp_path):
    model = get_peft_model(mlp(), lora(["first"]))
    state = get_base_model_state_dict(model)
    with pytest.raises(RuntimeError, match=r"Missing key first\.weight"):
        set_base_model_state_dict(model, {key: value for key, value in state.items() if key != "first.weight"})
    with pytest.raises(RuntimeError, match="Unexpected key more"):
        set_base_model_state_dict(model, state | {"more": torch.ones(2)})


def test_an_adapter_without_values_gets_its_memory_when_it_is_filled():
    config = lora(["first", "mid"], bias="all", modules_to_save=["last"])
    filled = randomize(get_peft_model(mlp(), config)).eval()
    model = get_peft_model(mlp(), config, low_cpu_mem_usage=True).eval()
    values = get_peft_model_state_dict(filled)
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert len(empty) == len(values)

    set_peft_model_state_dict(model, values, low_cpu_mem_usage=True)
    assert not model.base_model.model.first.lora_A["default"].weight.is_meta
    x = torch.randn(2, 12)
    torch.testing.assert_close(model(x), filled(x))


def test_a_state_dict_that_does_not_fit_leaves_an_adapter_without_values_as_it_was():
    model = get_peft_model(mlp(), lora(["first", "mid"], bias="all"), low_cpu_mem_usage=True)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    values = get_peft_model_state_dict(get_peft_model(mlp(), lora(["first"], bias="all")))
    with pytest.raises(CheckpointError, match="mid"):
        set_peft_model_state_dict(model, values)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_model_is_the_model_where_it_has_no_part_of_that_name():
    model = get_peft_model(mlp(), lora(["first"]))
    assert model.model.first is model.base_model.model.first
    with pytest.raises(AttributeError, match="other_name"):
        model.other_name  # noqa: B018
    assert not hasattr(model.unload(), "model")
    inner = get_peft_model(llama(), lora(["v_proj"]))
    assert type(inner.model).__name__ == "LlamaModel"  # its own part

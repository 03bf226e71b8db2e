"""``modules_to_save``, token rows and ties: what one library saves opens in the other with the same outputs, or is refused."""

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import transformers
from safetensors.torch import load_file, save_file

import minilora
from minilora.lora.slots import adapters_of
from tests.models import gpt2_config, llama_config

# PEFT says that a tie is parted, or that nothing is tied; here that is what is tested.
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in (
    r"\s*Model has `tie_word_embeddings=True`", "You have requested `ensure_weight_tying`", r"ensure_weight_tying=True but",
    ".*shares its weight with another layer", "Setting `save_embedding_layers`", ".*different token indices",
)]  # fmt: skip

KINDS = {
    "llama": (transformers.LlamaForCausalLM, llama_config, ["q_proj"]),
    "gpt2": (transformers.GPT2LMHeadModel, gpt2_config, ["c_attn"]),
    "classifier": (transformers.LlamaForSequenceClassification, llama_config, ["q_proj"]),
}


@pytest.fixture
def build():
    """``build(kind, tied)``: a tiny model of a kind, always the same."""

    def make(kind, tied=False):
        cls, config, _ = KINDS[kind]
        torch.manual_seed(3)
        fields = {"num_labels": 3, "pad_token_id": 0} if kind == "classifier" else {"tie_word_embeddings": tied}
        return cls(config(**fields)).eval()

    return make


def adapted(library, model, kind, fields):
    own = {
        "r": 4,
        "lora_alpha": 12,
        "target_modules": KINDS[kind][2],
        "fan_in_fan_out": kind == "gpt2",
        **copy.deepcopy(fields),
    }
    return library.get_peft_model(model, library.LoraConfig(**own))


def move(model):
    """Change all that trains, each number once."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters() if p.requires_grad}.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def both_ways(build, ids, folder, kind, tied, fields):
    for there, here in ((peft, minilora), (minilora, peft)):
        model = move(adapted(there, build(kind, tied), kind, fields))
        wanted = logits(model, ids)
        assert (wanted - logits(build(kind, tied), ids)).abs().max() > 0.05
        model.save_pretrained(folder / there.__name__)
        opened = here.PeftModel.from_pretrained(build(kind, tied), folder / there.__name__)
        torch.testing.assert_close(logits(opened, ids), wanted, rtol=0, atol=5e-6)
        keys = [set(load_file(folder / there.__name__ / "adapter_model.safetensors"))]
    return keys


TABLE = {"llama": "embed_tokens", "gpt2": "wte"}


@pytest.mark.parametrize("ensure", [False, True], ids=["free", "ensured"])
@pytest.mark.parametrize("which", ["table", "head", "both"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_copies_of_table_and_head_open_in_the_other_library(build, token_ids, tmp_path, kind, tied, which, ensure):
    if kind == "gpt2" and tied and which == "table" and ensure:
        pytest.skip("PEFT ties a table by its name, which is another one here: the next test")
    names = {"table": [TABLE[kind]], "head": ["lm_head"], "both": [TABLE[kind], "lm_head"]}[which]
    both_ways(build, token_ids, tmp_path, kind, tied, {"modules_to_save": names, "ensure_weight_tying": ensure})


def test_table_that_peft_did_not_tie_is_loaded_untied(build, token_ids, tmp_path):
    fields = {"modules_to_save": ["wte"], "ensure_weight_tying": True}
    theirs = move(adapted(peft, build("gpt2", True), "gpt2", fields))
    theirs.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" not in load_file(tmp_path / "adapter_model.safetensors")
    ours = minilora.PeftModel.from_pretrained(build("gpt2", True), tmp_path)
    torch.testing.assert_close(logits(ours, token_ids), logits(theirs, token_ids), rtol=0, atol=5e-6)
    assert not ours.peft_config["default"].ensure_weight_tying
    tied = move(adapted(minilora, build("gpt2", True), "gpt2", fields))
    tied.save_pretrained(tmp_path / "tied")
    opened = peft.PeftModel.from_pretrained(build("gpt2", True), tmp_path / "tied")
    torch.testing.assert_close(logits(opened, token_ids), logits(tied, token_ids), rtol=0, atol=5e-6)
    assert (
        minilora.PeftModel.from_pretrained(build("gpt2", True), tmp_path / "tied")
        .peft_config["default"]
        .ensure_weight_tying
    )


@pytest.mark.parametrize("ensure", [False, True], ids=["free", "ensured"])
@pytest.mark.parametrize(
    "rows", [[3, 5], {"embed_tokens": [3, 5]}, {"embed_tokens": [3, 5], "lm_head": [3, 5]}, {"lm_head": [9]}]
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_token_rows_open_in_the_other_library(build, token_ids, tmp_path, tied, rows, ensure):
    ids = torch.cat([token_ids, torch.full_like(token_ids, 3)])
    both_ways(build, ids, tmp_path, "llama", tied, {"trainable_token_indices": rows, "ensure_weight_tying": ensure})


def test_what_would_be_dropped_beside_a_tied_copy_is_refused(build):
    """PEFT cannot open, or make, either; the copy would take the other's place."""
    for fields in ({"trainable_token_indices": [3, 5]}, {"target_modules": ["q_proj", "embed_tokens"]}):
        model = build("llama", True)
        before = {name: id(p) for name, p in model.named_parameters()}
        with pytest.raises(minilora.MiniLoraError, match=r"modules_to_save: lm_head trains whole"):
            adapted(minilora, model, "llama", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True, **fields})
        assert {name: id(p) for name, p in model.named_parameters()} == before


# Names


@pytest.mark.parametrize("names", [["norm"], ["attention_layernorm", "model.norm"], ["input_layernorm"]])
def test_a_name_means_every_path_that_ends_in_it(build, token_ids, tmp_path, names):
    both_ways(build, token_ids, tmp_path, "llama", False, {"modules_to_save": names})
    found = [set(load_file(tmp_path / library / "adapter_model.safetensors")) for library in ("peft", "minilora")]
    assert found[0] == found[1]
    assert len([key for key in found[0] if "norm" in key]) == {"norm": 5, "attention_layernorm": 3}.get(names[0], 2)


@pytest.mark.parametrize(
    "fields", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier", "score"]}], ids=["task", "names"]
)
def test_head_of_a_classifier(build, token_ids, tmp_path, fields):
    both_ways(build, token_ids, tmp_path, "classifier", False, fields)
    model = adapted(minilora, build("classifier"), "classifier", fields)
    assert [path for path, slot in adapters_of(model).slots.items() if "score" in path] == ["score"]
    loss = model(input_ids=token_ids, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert model.score.weight.grad.abs().max() > 0


def test_classifier_file_of_peft_for_a_head_of_another_name(build, token_ids, tmp_path):
    """PEFT names the two usual heads whatever the model has, and says nothing where it has neither."""
    theirs = move(adapted(peft, build("llama"), "llama", {}))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}))
    ours = minilora.PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(logits(ours, token_ids), logits(theirs, token_ids), rtol=0, atol=5e-6)


@pytest.mark.parametrize("names", [["nrom"], ["norm", "lm_haed"], ["clasifier", "score"], ["classifier"]])
def test_a_name_that_matches_nothing_is_refused(build, names):
    kind = "classifier" if "score" in names else "llama"
    with pytest.raises(minilora.MiniLoraError, match="matches nothing; the closest names are"):
        adapted(minilora, build(kind), kind, {"modules_to_save": names})


def test_folder_of_the_time_when_a_name_was_a_whole_one(build, token_ids, tmp_path):
    model = move(adapted(minilora, build("llama"), "llama", {"modules_to_save": ["model.norm"]}))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": ["norm"]}))
    (tmp_path / "minilora.json").unlink()
    again = minilora.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    assert again.peft_config["default"].modules_to_save == ("model.norm",)
    # A file that has some of the others is one of today that lacks the rest.
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.input_layernorm.weight"
    save_file({**tensors, name: torch.ones(64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(minilora.MiniLoraError, match="missing"):
        minilora.PeftModel.from_pretrained(build("llama"), tmp_path)

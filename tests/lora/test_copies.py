"""Copies, biases and token rows: trained in fp32, cast on the way out, and one where the model has one."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import minilora
from minilora import LoraConfig
from minilora.errors import TargetError
from minilora.lora.slots import adapters_of
from minilora.store.load import adapter_state_dict

transformers = pytest.importorskip("transformers")
IDS = torch.tensor([[5, 9, 2, 7, 1, 3, 8]])


def config(*targets, **fields):
    return LoraConfig(r=4, lora_alpha=12, target_modules=list(targets or ["q_proj"]), **fields)


def llama(dtype=torch.float32, tied=False):
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(settings).to(dtype).eval()


def t5():
    torch.manual_seed(0)
    settings = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
                                     decoder_start_token_id=0)  # fmt: skip
    return transformers.T5ForConditionalGeneration(settings).eval()


def logits(model):
    return model(input_ids=IDS, **({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})).logits


WHOLE = {"modules_to_save": ["lm_head", "model.norm"], "bias": "all", "trainable_token_indices": [1, 5]}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_trains_is_fp32_in_a_model_of_half_precision(dtype, randomize, tmp_path):
    model = llama(dtype)
    plain = logits(model)
    model = minilora.get_peft_model(model, config(**WHOLE))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32} and len(trained) > 10
    first = logits(model)
    assert first.dtype == dtype
    torch.testing.assert_close(first, plain, rtol=3e-2, atol=3e-2)
    model(IDS, labels=IDS).loss.backward()
    assert not [name for name, p in trained.items() if p.grad is None and "k_proj.bias" not in name]
    randomize(model)
    changed = logits(model)
    assert changed.dtype == dtype and (changed - plain).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    again = minilora.PeftModel.from_pretrained(llama(dtype), tmp_path)
    assert torch.equal(logits(again), changed)
    bare = model.merge_and_unload()
    assert {p.dtype for p in bare.parameters()} == {dtype}
    assert type(bare.lm_head) is nn.Linear and type(bare.model.layers[0].self_attn.k_proj) is nn.Linear
    torch.testing.assert_close(logits(bare), changed, rtol=5e-2, atol=5e-2 * float(changed.detach().abs().max()))


def test_small_steps_are_not_lost():
    """In bf16 a value near 1 does not move by 1e-3 a step; most of them stayed where they were."""
    model = minilora.inject(llama(torch.bfloat16), config(modules_to_save=["model.norm"], bias="all"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    start = model.model.norm.weight.detach().clone()
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model.model.norm.weight != start).float().mean() > 0.9


def test_fp16_trains_with_a_scaler():
    model = minilora.inject(llama(torch.float16), config(**WHOLE)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    scaler.scale(model(IDS, labels=IDS).loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert model.lm_head.weight.grad.isfinite().all()


def test_their_dtype_may_be_the_models():
    model = minilora.get_peft_model(llama(torch.bfloat16), config(**WHOLE), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    logits(model)


def test_a_model_with_copies_can_be_copied_and_pickled(randomize):
    model = randomize(minilora.get_peft_model(llama(torch.bfloat16), config(**WHOLE)))
    wanted = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(logits(twin), wanted)
        with twin.disable_adapter():
            assert not torch.equal(logits(twin), wanted)
        assert type(twin.unload()) is transformers.LlamaForCausalLM
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), wanted)


# ---- one weight in several modules


def test_a_table_that_others_share_is_not_copied_alone(snapshot):
    model = t5()
    before = snapshot(model)
    with pytest.raises(
        TargetError, match=r"shared shares its weight with encoder\.embed_tokens.*ensure_weight_tying=True"
    ):
        minilora.inject(model, config("q", modules_to_save=["shared"]))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("make", "saved", "places"),
    [
        (t5, "shared", ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
        (lambda: llama(tied=True), "embed_tokens", ["lm_head"]),
        (lambda: llama(tied=True), "lm_head", ["model.embed_tokens"]),
    ],
    ids=["t5", "embedding", "head"],
)
def test_tied_copies_stay_one(make, saved, places, randomize, tmp_path):
    model = make()
    target = "q" if model.config.is_encoder_decoder else "q_proj"
    minilora.get_peft_model(model, config(target, modules_to_save=[saved], ensure_weight_tying=True))
    path = next(path for path, slot in adapters_of(model).slots.items() if path.endswith(saved))
    one = model.get_submodule(path).weight
    assert all(model.get_submodule(place).weight is one for place in places)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert one.grad.abs().max() > 0
    randomize(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    again = minilora.PeftModel.from_pretrained(make(), tmp_path)
    assert (
        torch.equal(logits(again), wanted) and again.get_submodule(places[0]).weight is again.get_submodule(path).weight
    )
    bare = model.merge_and_unload()
    assert bare.get_submodule(places[0]).weight is bare.get_submodule(path).weight
    torch.testing.assert_close(logits(bare), wanted, rtol=1e-4, atol=1e-4 * float(wanted.detach().abs().max()))


def test_a_bias_of_two_modules_trains_in_both():
    torch.manual_seed(0)
    settings = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                       intermediate_size=64)  # fmt: skip
    model = minilora.inject(transformers.BertForMaskedLM(settings), config("query", bias="all"))
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias
    model(IDS, labels=IDS).loss.backward()
    assert model.cls.predictions.bias.grad.abs().max() > 0


@pytest.mark.parametrize("make", [t5, lambda: llama(tied=True)], ids=["t5", "llama"])
@pytest.mark.parametrize("kind", ["rows", "lora"])
def test_every_place_of_a_tied_table_changes(make, kind, randomize):
    model = make()
    table, target = ("shared", "q") if model.config.is_encoder_decoder else ("embed_tokens", "q_proj")
    before = logits(model)
    if kind == "rows":
        minilora.inject(model, config(target, trainable_token_indices=[1, 5]))
    else:
        minilora.inject(model, config(table, ensure_weight_tying=True))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    randomize(model)
    changed = logits(model)
    assert (changed - before).abs().max() > 0.1
    minilora.merge(model)
    torch.testing.assert_close(logits(model), changed, rtol=1e-4, atol=1e-4 * float(changed.detach().abs().max()))


def test_an_embedding_and_its_tied_head_both_named_are_one_adapter(randomize):
    for names in (["embed_tokens", "lm_head"], ["lm_head", "embed_tokens"]):
        model = minilora.inject(llama(tied=True), config(*names, ensure_weight_tying=True))
        assert not any("lm_head.lora" in name for name, _ in model.named_parameters())
        changed = logits(randomize(model))
        minilora.merge(model)
        torch.testing.assert_close(logits(model), changed, rtol=1e-4, atol=1e-3 * float(changed.detach().abs().max()))
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_rows_of_a_head_of_its_own(randomize, tmp_path):
    model, rows = llama(), {"embed_tokens": [1, 5], "lm_head": [2, 7, 3]}
    before = logits(model)
    model = minilora.get_peft_model(model, config(trainable_token_indices=rows))
    torch.testing.assert_close(logits(model), before)
    randomize(model)
    changed = logits(model)
    assert adapter_state_dict(model)["base_model.model.lm_head.token_adapter.trainable_tokens_delta"].shape == (3, 32)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(minilora.PeftModel.from_pretrained(llama(), tmp_path)), changed)
    torch.testing.assert_close(logits(model.merge_and_unload()), changed, rtol=1e-4, atol=1e-4)


def test_other_rows_of_a_tied_head_are_refused_where_they_must_be_one():
    rows = {"embed_tokens": [1, 5], "lm_head": [2]}
    with pytest.raises(TargetError, match="lm_head is tied to a table of which other rows train"):
        minilora.inject(llama(tied=True), config(trainable_token_indices=rows, ensure_weight_tying=True))


# ---- the model as an object


def test_a_compiled_model_has_the_names_of_the_plain_one(randomize, tmp_path):
    model = torch.compile(llama(), backend="eager")
    before = logits(model)
    peft = randomize(minilora.get_peft_model(model, config()))
    wanted = logits(peft)
    assert peft is model and (wanted - before).abs().max() > 0.01
    peft.save_pretrained(tmp_path)
    assert not [key for key in adapter_state_dict(peft) if "_orig_mod" in key]
    torch.testing.assert_close(logits(minilora.PeftModel.from_pretrained(llama(), tmp_path)), wanted)
    other = torch.compile(llama(), backend="eager")
    minilora.load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), wanted)


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_copy_that_parts_from_its_twin_is_not_tied_again_by_saving(saved, randomize, tmp_path):
    with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
        model = minilora.get_peft_model(llama(tied=True), config(modules_to_save=[saved]))
    wanted = logits(randomize(model))
    bare = model.merge_and_unload()
    assert bare.config.tie_word_embeddings is False
    bare.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), wanted, rtol=1e-4, atol=1e-4 * float(wanted.detach().abs().max()))

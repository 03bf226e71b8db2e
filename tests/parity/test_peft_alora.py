"""Activated LoRA: the update begins at the last invocation of each row, in training, inference and generation, as in PEFT."""

import json

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft

import minilora
from minilora import LoraConfig
from minilora.errors import ConfigError, StateError, TargetError
from minilora.lora.adapter import variants_on
from minilora.lora.slots import adapters_of
from minilora.lora.variants.alora import activated, active_lengths

CALL = [7, 9]
FIELDS = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
ALORA = FIELDS | {"alora_invocation_tokens": CALL}
IDS = torch.randint(10, 64, (3, 12), generator=torch.Generator().manual_seed(3))
IDS[0, 5:7] = torch.tensor(CALL)
IDS[1, 2:4] = IDS[1, 9:11] = torch.tensor(CALL)  # twice: the last counts
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


def scattered(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, tensor in sorted(minilora.get_peft_model_state_dict(model).items()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def pair(build_model, tmp_path):
    ours = scattered(minilora.get_peft_model(build_model("llama"), LoraConfig(**ALORA))).eval()
    ours.save_pretrained(tmp_path / "ours")
    return ours, peft.PeftModel.from_pretrained(build_model("llama"), tmp_path / "ours", is_trainable=True).eval()


def close(left, right, tolerance=1e-5):
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def test_the_place_of_the_last_invocation():
    assert active_lengths(IDS, CALL).tolist() == [7, 3, 0]
    assert active_lengths(IDS[:, :1], CALL).tolist() == [0, 0, 0]
    assert active_lengths(torch.tensor([[7, 7, 9, 7]]), [7, 9]).tolist() == [3]


def test_logits_and_files_are_those_of_peft(build_model, tmp_path):
    ours, theirs = pair(build_model, tmp_path)
    base = build_model("llama").eval()(input_ids=IDS).logits
    got = ours(input_ids=IDS).logits
    close(got, theirs(input_ids=IDS).logits)
    assert torch.equal(ours(IDS).logits, got)  # the ids by position
    for row, active in enumerate(active_lengths(IDS, CALL).tolist()):
        close(got[row, : 12 - active], base[row, : 12 - active], 1e-6)
        assert not active or (got[row, 12 - active :] - base[row, 12 - active :]).abs().amax(1).min() > 1e-3
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["alora_invocation_tokens"] == CALL
    back = minilora.PeftModel.from_pretrained(build_model("llama"), tmp_path / "theirs")
    close(back(input_ids=IDS).logits, got)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_looks_at_the_prompt(build_model, tmp_path, beams):
    ours, theirs = pair(build_model, tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(IDS)}
    got = ours.generate(input_ids=IDS, pad_token_id=0, **options)
    if beams == 1:
        assert torch.equal(got, theirs.generate(input_ids=IDS, pad_token_id=0, **options))
        plain = build_model("llama").eval().generate(input_ids=IDS, pad_token_id=0, **options)
        assert torch.equal(got[2], plain[2]) and not torch.equal(got[0], plain[0])
    assert got.shape[1] <= 18


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_peft(build_model, tmp_path, checkpointing):
    ours, theirs = pair(build_model, tmp_path)
    for model in (ours, theirs):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        for _ in range(2):  # one backward after each forward
            model(input_ids=IDS, labels=IDS).loss.backward()
    mine = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    other = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert mine.keys() == other.keys() and len(mine) == 12
    for name, gradient in mine.items():
        close(gradient, other[name], 1e-4)


def test_a_checkpointed_pass_after_two_different_calls_is_refused(build_model):
    model = scattered(minilora.get_peft_model(build_model("llama"), LoraConfig(**ALORA))).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first = model(input_ids=IDS, labels=IDS).loss
    second = model(input_ids=IDS.flip(0), labels=IDS).loss
    with pytest.raises(StateError, match="after several calls"):
        (first + second).backward()


def test_what_an_activated_adapter_cannot_do(build_model, tmp_path):
    model = scattered(minilora.get_peft_model(build_model("llama"), LoraConfig(**ALORA))).eval()
    with pytest.raises(StateError, match="cannot be merged"):
        model.merge_adapter()
    with pytest.raises(StateError, match="no plain LoRA"):
        model(input_ids=IDS, adapter_names=["default"] * 3)
    with pytest.raises(StateError, match="this call has none"):
        model(inputs_embeds=model.get_input_embeddings()(IDS))
    layer = adapters_of(model).named("default")["model.layers.0.self_attn.q_proj"]
    with pytest.raises(StateError, match="does not know where its invocation begins"):
        layer(torch.randn(3, 12, 64))
    with activated(model, IDS), pytest.raises(StateError, match="takes the tokens of all rows at once"):
        layer(torch.randn(36, 64))
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, build_model("llama").eval()(input_ids=IDS).logits)
    with pytest.raises(TargetError, match=f"takes {' or '.join(sorted(variants_on('embedding')))}, not alora"):
        minilora.get_peft_model(build_model("llama"), LoraConfig(**ALORA | {"target_modules": ["embed_tokens"]}))


@pytest.mark.parametrize("bad", [[], [1.5], "abc", [-1], 3])
def test_tokens_that_are_none(bad):
    with pytest.raises(ConfigError, match="alora_invocation_tokens="):
        LoraConfig(alora_invocation_tokens=bad)


@pytest.mark.parametrize("other", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}], ids=str)
def test_it_goes_with_plain_lora(other):
    with pytest.raises(ConfigError, match=r"plain LoRA, not (with|for)"):
        LoraConfig(alora_invocation_tokens=CALL, **other)


def test_a_swap_keeps_the_invocation(build_model, tmp_path):
    model = scattered(minilora.get_peft_model(build_model("llama"), LoraConfig(**ALORA)))
    other = scattered(
        minilora.get_peft_model(build_model("llama"), LoraConfig(**ALORA | {"alora_invocation_tokens": [3]}))
    )
    other.save_pretrained(tmp_path)
    with pytest.raises(minilora.MiniLoraError, match="other alora_invocation_tokens"):
        model.hotswap_adapter(tmp_path)

"""prepare_model_for_kbit_training: norms alone in fp32 by default, PEFT's behaviour by name."""

import copy
import pickle

import pytest
import torch
import transformers

import minilora
from minilora import LoraConfig, QuantConfig, get_peft_model, prepare_model_for_kbit_training, quantize_model
from minilora.errors import ConfigError, StateError
from tests.models import gpt2_config, llama_config

TOKENS = torch.tensor([[5, 9, 2, 33, 7], [1, 1, 70, 4, 6]])


def tiny(kind="llama", dtype=torch.bfloat16):
    torch.manual_seed(3)
    common = {"vocab_size": 80, "bos_token_id": 1, "eos_token_id": 2}
    llama = kind == "llama"
    config = llama_config(intermediate_size=88, **common) if llama else gpt2_config(n_embd=64, n_head=4, **common)
    return quantize_model(transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), QuantConfig())


def names(model, dtype):
    return {name for name, parameter in model.named_parameters() if parameter.dtype == dtype}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_norms_alone_become_fp32_and_the_stream_keeps_its_dtype(kind):
    model = tiny(kind)
    before, wanted = names(model, torch.bfloat16), model(TOKENS).logits
    prepare_model_for_kbit_training(model)
    raised = names(model, torch.float32)
    assert raised and raised == {name for name in before if "norm" in name or "ln_" in name}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.is_gradient_checkpointing
    got = model(TOKENS).logits
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, atol=0.02, rtol=0.02)


def test_all_is_what_peft_does():
    peft = pytest.importorskip("peft")
    ours, theirs = tiny(), tiny()
    prepare_model_for_kbit_training(ours, upcast="all", use_gradient_checkpointing=False)
    peft.prepare_model_for_kbit_training(theirs, use_gradient_checkpointing=False)
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, wanted[name]) and parameter.dtype == wanted[name].dtype, name
        assert not parameter.requires_grad
    assert torch.equal(ours(TOKENS).logits, theirs(TOKENS).logits)


@pytest.mark.parametrize("upcast", ["norms", "all", "none"])
@pytest.mark.parametrize("options", [None, {"use_reentrant": True}], ids=str)
def test_gradients_reach_the_adapters_and_checkpointing_does_not_change_them(upcast, options):
    grads = []
    for on in (False, True):
        model = prepare_model_for_kbit_training(tiny(), on, options, upcast)
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, config).train()
        model(TOKENS, labels=TOKENS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(grads[0]) == 8 and all(grad is not None and grad.abs().sum() > 0 for grad in grads[0].values())
    for name, grad in grads[0].items():
        assert torch.equal(grads[1][name], grad), name


def test_prepared_models_can_be_copied_cast_and_prepared_again():
    model = prepare_model_for_kbit_training(tiny("gpt2"), use_gradient_checkpointing=False)
    wanted = model(TOKENS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(TOKENS).logits, wanted)
        assert names(twin, torch.float32) == names(model, torch.float32)
    lowered = model.to(torch.bfloat16)
    assert lowered(TOKENS).logits.isfinite().all()
    assert names(prepare_model_for_kbit_training(lowered, use_gradient_checkpointing=False), torch.float32)
    assert torch.equal(lowered(TOKENS).logits, wanted)


def test_a_model_with_norm_in_its_name_is_no_norm():
    config = transformers.RobertaPreLayerNormConfig(
        vocab_size=80, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = transformers.RobertaPreLayerNormForMaskedLM._from_config(config, dtype=torch.bfloat16).eval()
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert all("LayerNorm" in name or "layer_norm" in name for name in names(model, torch.float32))
    assert model(TOKENS).logits.dtype == torch.bfloat16


def test_bad_calls_are_refused():
    with pytest.raises(ConfigError, match="upcast='norm': wanted 'norms', 'all'"):
        prepare_model_for_kbit_training(tiny(), upcast="norm")
    with pytest.raises(StateError, match="use_gradient_checkpointing=False"):
        prepare_model_for_kbit_training(torch.nn.Linear(3, 2))
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(StateError, match="before get_peft_model"):
        prepare_model_for_kbit_training(model)
    assert minilora.many.adapted.count_parameters(model)[0] > 0


def mamba2(dtype):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2, head_dim=8, num_heads=8, n_groups=1, expand=2
    )
    return transformers.Mamba2ForCausalLM(config).to(dtype).eval()


def mamba(dtype):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("make", [mamba, mamba2])
def test_norms_of_state_space_models_are_raised_and_hand_on_what_they_had(make):
    """A gated norm is one by its name; Mamba casts to the norm's own dtype before it calls it, and its layers take bf16."""
    model, ids = make(torch.bfloat16), torch.tensor([[5, 9, 2, 7]])
    before = model(ids).logits
    minilora.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    assert {norm.weight.dtype for norm in norms} == {torch.float32} and len(norms) >= 3
    after = model(ids).logits
    assert after.dtype == before.dtype
    torch.testing.assert_close(after, before, rtol=5e-2, atol=5e-2)
    model.to(torch.float32)
    assert model(ids).logits.isfinite().all()

"""Adapters on layers that bitsandbytes has packed: the standard QLoRA script, as PEFT runs it."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import bitsandbytes
import peft
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

import minilora
from minilora import LoraConfig
from minilora.errors import StateError, TargetError
from minilora.linear.layers import dense_weight
from minilora.lora.slots import adapters_of
from tests.models import llama_config, plain_bitsandbytes

plain_bitsandbytes()

# PEFT asks transformers for the older of two names.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(3))
KINDS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}
FIELDS = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear"}
CASES = {"4bit": ("4bit", {}), "4bit dora": ("4bit", {"use_dora": True}), "8bit": ("8bit", {})}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(7)
    place = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(llama_config(intermediate_size=96, attention_bias=True)).save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def quiet():
    """bitsandbytes says at every call that it casts to fp16."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def load(folder, kind):
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**KINDS[kind]), device_map="cpu"
    )


def prepared(folder, kind, library):
    more = {"upcast": "all"} if library is minilora else {}
    return library.prepare_model_for_kbit_training(
        load(folder, kind), gradient_checkpointing_kwargs={"use_reentrant": False}, **more
    )


def trained(folder, case, library):
    """The adapted model, its losses, and its logits afterwards."""
    kind, fields = CASES[case]
    model = prepared(folder, kind, library)
    torch.manual_seed(1)
    model = library.get_peft_model(model, library.LoraConfig(**FIELDS, **fields)).train()
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), losses, logits(model)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@every_case
def test_training_saving_and_loading_as_peft(folder, case, tmp_path):
    kind = CASES[case][0]
    ours, losses, mine = trained(folder, case, minilora)
    assert losses[-1] < losses[0]
    theirs, other_losses, other = trained(folder, case, peft)
    close(torch.tensor(losses), torch.tensor(other_losses))
    close(mine, other)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    close(logits(peft.PeftModel.from_pretrained(prepared(folder, kind, peft), tmp_path / "ours")), mine)
    close(logits(minilora.PeftModel.from_pretrained(prepared(folder, kind, minilora), tmp_path / "theirs")), other)


@every_case
def test_merging_makes_a_dense_model_that_can_be_saved(folder, case, tmp_path):
    model, _, before = trained(folder, case, minilora)
    # What bitsandbytes computes with 8 bits rounds its inputs too; a dense layer does not.
    most = (1e-4 if "4bit" in case else 0.05) * before.abs().max()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(StateError, match="merged to a dense layer only"):
        minilora.merge(model, requantize=True)
    model.merge_adapter()
    assert (logits(model) - before).abs().max() < most
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    merged = model.merge_and_unload()
    want = logits(merged)
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear and not merged.is_quantized
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_merged_in_part_can_be_saved(folder, kind, tmp_path):
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], init_lora_weights=False)
    merged = minilora.get_peft_model(load(folder, kind), config).eval().merge_and_unload()
    want = logits(merged)
    assert (want - logits(load(folder, kind))).abs().max() > 0.05
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    close(logits(again), want)
    layer = again.model.layers[0].self_attn
    assert type(layer.q_proj) is nn.Linear and type(layer.k_proj).__module__.startswith("bitsandbytes")


@pytest.mark.parametrize("flow", [torch.float32, torch.bfloat16], ids=str)
def test_a_bfloat16_model_is_merged_to_what_flows_through_it(folder, flow):
    config = BitsAndBytesConfig(**KINDS["4bit"], bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model = minilora.prepare_model_for_kbit_training(model, upcast="all" if flow == torch.float32 else "none")
    model = minilora.get_peft_model(model, LoraConfig(**FIELDS, init_lora_weights=False)).eval()
    before = logits(model)
    merged = model.merge_and_unload()
    assert merged.model.layers[0].mlp.up_proj.weight.dtype == flow == merged.model.layers[0].self_attn.q_proj.bias.dtype
    torch.testing.assert_close(logits(merged), before, rtol=0.1, atol=0.1)


def four_bit(**fields):
    torch.manual_seed(2)
    layer = bitsandbytes.nn.Linear4bit(40, 24, compute_dtype=torch.float32, quant_type="nf4", **fields)
    return layer.to("cpu").requires_grad_(False)


def eight_bit():
    torch.manual_seed(2)
    return bitsandbytes.nn.Linear8bitLt(40, 24, has_fp16_weights=False).to("cpu").requires_grad_(False)


LAWS = ({}, {"use_dora": True}, {"lora_bias": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"})


@pytest.mark.parametrize("fields", LAWS, ids=str)
@pytest.mark.parametrize("make", [four_bit, eight_bit])
def test_the_law(make, fields):
    model = nn.ModuleDict({"layer": make()}).eval()
    x = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1))
    base = model["layer"](x)
    minilora.inject(model, LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], **fields))
    assert (model["layer"](x) - base).abs().max() < 1e-5
    adapter = adapters_of(model).named("default")["layer"]
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if not name.startswith("base_layer"):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    shift = adapter.delta_bias()
    weight = dense_weight(adapter.innermost) + adapter.delta_weight()
    want = F.linear(x, weight, adapter.innermost.bias + (0 if shift is None else shift))
    got, size = model["layer"](x), want.abs().max()
    assert (got - want).abs().max() < (1e-5 if make is four_bit else 0.02) * size  # 8 bits round the input too
    assert (got - base).abs().max() > 0.3 * size
    assert model["layer"].weight.shape == (24, 40) and model["layer"].weight.dtype == torch.float32
    torch.testing.assert_close(model["layer"].weight + 0, weight)


@pytest.mark.parametrize("make", [four_bit, eight_bit])
def test_what_is_packed_already_is_not_packed_nor_copied(make):
    model = nn.ModuleDict({"layer": make(), "other": nn.Linear(24, 5)})
    copied = LoraConfig(target_modules=["other"], modules_to_save=["layer"])
    with pytest.raises(TargetError, match="layer is quantized and cannot be trained whole"):
        minilora.inject(model, copied)
    with pytest.raises(TargetError, match="packed already"):
        minilora.inject(model, LoraConfig(target_modules=["layer"], init_lora_weights="loftq"))
    with pytest.raises(TargetError, match="layer is quantized already"):
        minilora.quantize_model(model, target_modules=["layer"])
    minilora.quantize_model(model)
    assert type(model["layer"]).__module__.startswith("bitsandbytes") and isinstance(
        model["other"], minilora.QuantLinear
    )


def test_a_layer_that_was_never_packed_says_so():
    model = nn.ModuleDict({"layer": bitsandbytes.nn.Linear4bit(40, 24)})
    with pytest.raises(StateError, match=r"no packed weight yet.*to\('cpu'\)"):
        minilora.inject(model, LoraConfig(target_modules=["layer"]))


def test_bytes_that_are_called_halves_stay_bytes():
    model = nn.ModuleDict({"layer": four_bit(quant_storage=torch.bfloat16), "norm": nn.LayerNorm(24).bfloat16()})
    before = model["layer"].weight.data.clone()
    minilora.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False, upcast="all")
    assert model["norm"].weight.dtype == torch.float32
    assert model["layer"].weight.dtype == torch.bfloat16
    assert torch.equal(model["layer"].weight.data.view(torch.uint8), before.view(torch.uint8))

"""A global default dtype or device changes nothing of what is packed, drawn, remembered or decoded."""

import copy
import json

import pytest
import torch

import minilora
from minilora import LoraConfig, QuantConfig
from minilora.lora.slots import adapters_of
from minilora.store.load import adapter_state_dict

KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa_niter_2"},
    "rows": {"trainable_token_indices": [1, 5]},
    "vera": {},
    "lora_xs": {},
}
IDS = torch.tensor([[5, 9, 2, 7, 1]])


def made(base, kind, folder, bits=4):
    """Pack, inject and save; the tensors of the packed model, of the adapter, and its seal."""
    model = minilora.quantize_model(copy.deepcopy(base), QuantConfig(f"nf{bits}", double_quant=True, scale="mse"))
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"], **KINDS[kind])
    minilora.inject(model, config, variant=kind if kind in ("vera", "lora_xs") else None)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    minilora.save_adapter(model, folder)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    return (
        kept,
        {name: value.clone() for name, value in adapter_state_dict(model).items()},
        (folder / "minilora.json").read_text(),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("default", ["float64", "bfloat16", "meta"])
def test_defaults_do_not_leak(kind, default, make_llama, tmp_path):
    base = make_llama()
    plain = made(base, kind, tmp_path / "plain")
    loaded = minilora.quantize_model(copy.deepcopy(base), QuantConfig(double_quant=True, scale="mse"))
    minilora.load_adapter(loaded, tmp_path / "plain")
    wanted = loaded.eval()(IDS).logits
    try:
        torch.set_default_device("meta") if default == "meta" else torch.set_default_dtype(getattr(torch, default))
        here = made(base, kind, tmp_path / "here")
        other = minilora.quantize_model(copy.deepcopy(base), QuantConfig(double_quant=True, scale="mse"))
        minilora.load_adapter(other, tmp_path / "plain")  # its seal remembers the base in fp32
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for one, two in zip(plain[:2], here[:2], strict=True):
        assert one.keys() == two.keys()
        assert all(one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one)
    assert json.loads(plain[2]) == json.loads(here[2])
    assert torch.equal(other.eval()(IDS).logits, wanted) and adapters_of(other).active == ("default",)

"""Experts and routers under PEFT's names: the wrappers, what two adapters of different weights do, copies, packed experts."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import minilora
from minilora import LoraConfig
from minilora.errors import ConfigError, StateError
from minilora.lora.slots import adapters_of
from minilora.peft import (
    get_layer_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from minilora.peft.tuners.lora import ParamWrapper
from minilora.peft.utils.hotswap import prepare_model_for_compiled_hotswap
from tests.mixtures import mixture
from tests.models import randomize

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(3))
UP, DOWN, GATE = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def config(*names, **fields):
    return LoraConfig(**{"r": 3, "lora_alpha": 12, "target_parameters": list(names), **fields})


def faced(*names, **fields):
    return randomize(get_peft_model(mixture(), config(*names, **fields)))


def test_the_wrappers_stand_around_the_module_and_go_with_the_last_adapter():
    plain, model = mixture(), faced(UP, DOWN)
    before = type(plain.model.layers[0].mlp.experts)
    outer = model.base_model.model.model.layers[1].mlp.experts
    assert isinstance(outer, ParamWrapper) and isinstance(outer.base_layer, ParamWrapper)
    assert (outer.parameter_name, outer.base_layer.parameter_name) == ("down_proj", "gate_up_proj")
    assert type(outer.get_base_layer()) is before and outer.num_experts == 6
    assert [name for name, _ in outer.get_base_layer().named_parameters()] == ["gate_up_proj", "down_proj"]
    assert torch.equal(outer.get_param(), plain.model.layers[1].mlp.experts.down_proj)
    held = adapters_of(model).named("default")["model.layers.1.mlp.experts.down_proj"]
    assert outer.lora_A["default"].weight is held.lora_A
    assert torch.equal(outer.get_delta_weight("default"), held.delta_weight())
    outer.scaling["default"] = outer.base_layer.scaling["default"] = 0.0
    layer = model.base_model.model.model.layers[0].mlp.experts
    layer.scaling["default"] = layer.base_layer.scaling["default"] = 0.0
    assert torch.equal(logits(model), logits(plain))
    model.unload()
    assert type(model.model.layers[1].mlp.experts) is before
    assert list(model.state_dict()) == list(plain.state_dict())


def test_adapters_of_different_weights_stand_beside_each_other():
    model = faced(DOWN)
    first = logits(model)
    model.add_adapter("two", config(UP, GATE, r=2))
    assert torch.equal(logits(model), first)
    names = [status.name for status in get_layer_status(model) if ".0." in status.name]
    path = "model.model.layers.0.mlp.experts"
    assert names == [path, f"{path}.base_layer", "model.model.layers.0.mlp.gate"]
    model.set_adapter("two")
    randomize(model, 4)
    second, tensors = logits(model), get_peft_model_state_dict(model, adapter_name="two")
    assert "base_model.model.model.layers.0.mlp.experts.lora_A.weight" in tensors
    whole = get_peft_model_state_dict(model, state_dict=model.state_dict(), adapter_name="two")
    assert all(torch.equal(whole[key], tensor) for key, tensor in tensors.items())
    alone = get_peft_model(mixture(), config(UP, GATE, r=2))
    set_peft_model_state_dict(alone, tensors)
    assert torch.equal(logits(alone), second) and not torch.equal(second, first)
    model.base_model.set_adapter(["default", "two"])
    both = logits(model)
    assert not torch.equal(both, first) and not torch.equal(both, second)
    model.set_adapter("default")
    model.delete_adapter("two")
    assert torch.equal(logits(model), first)
    assert [type(part).__name__ for part in model.modules()].count("ParamWrapper") == 2


def test_copies_pickles_and_moved_models_compute_the_same():
    model = faced(UP, DOWN, GATE)
    want = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), want)
        randomize(other, 7)
        assert torch.equal(logits(model), want) and not torch.equal(logits(other), want)
    model.to(torch.float64)
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    assert experts.gate_up_proj.dtype == torch.float64
    torch.testing.assert_close(logits(model).float(), want, atol=1e-4, rtol=1e-4)


def test_parameters_that_torch_replaces_are_the_ones_that_compute():
    model = faced(UP)
    inner = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    for name in ("gate_up_proj", "down_proj"):
        inner._parameters[name] = torch.nn.Parameter(torch.zeros_like(inner._parameters[name]), False)
    plain = mixture()
    for parameter in plain.model.layers[0].mlp.experts.parameters():
        parameter.data.zero_()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(plain))


def test_train_and_eval_reach_the_dropout_of_experts():
    model = faced(UP, DOWN, lora_dropout=0.5)
    still = logits(model.eval())
    assert torch.equal(logits(model), still)
    model.train()
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model.eval()), still)


def test_packed_experts_have_wrappers_too():
    model = minilora.quantize_model(mixture(), minilora.QuantConfig("nf4", blocksize=32))
    bare = logits(model)
    model = get_peft_model(model, config(UP, DOWN))
    assert torch.equal(logits(model), bare)
    trainable, every = model.get_nb_trainable_parameters()
    dense = get_peft_model(mixture(), config(UP, DOWN)).get_nb_trainable_parameters()
    assert (trainable, every) == dense
    randomize(model)
    model.merge_adapter()
    model.unmerge_adapter()
    assert isinstance(model.base_model.model.model.layers[0].mlp.experts, ParamWrapper)


def test_state_dicts_come_back_under_pefts_names_and_layout():
    model, other = faced(UP, DOWN, GATE), get_peft_model(mixture(seed=1), config(UP, DOWN, GATE))
    whole = model.state_dict()
    assert whole["base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.default.weight"].shape == (40, 18)
    other.load_state_dict(whole)
    assert torch.equal(logits(other), logits(model))
    alone = get_peft_model(mixture(), config(UP, DOWN, GATE))
    set_peft_model_state_dict(alone, get_peft_model_state_dict(model))
    assert torch.equal(logits(alone), logits(model))


def test_a_larger_rank_is_made_room_for(tmp_path):
    large, model = faced(UP, DOWN, r=5), faced(UP, DOWN)
    large.save_pretrained(tmp_path / "large")
    before = logits(model)
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    torch.testing.assert_close(logits(model), before)
    minilora.hotswap_adapter(model, tmp_path / "large")
    torch.testing.assert_close(logits(model), logits(large), atol=1e-5, rtol=1e-4)


def test_a_start_from_the_weight_is_written_as_plain_lora(tmp_path):
    model = get_peft_model(mixture(), config(UP, DOWN, init_lora_weights="pissa"))
    model.save_pretrained(tmp_path / "start")
    randomize(model)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    plain = mixture()
    minilora.load_adapter(plain, tmp_path / "plain")
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-4, rtol=1e-4)
    assert (adapters_of(plain).configs["default"].variant, adapters_of(plain).configs["default"].r) == ("lora", 6)


def test_what_names_alone_do_not_say_is_refused():
    with pytest.raises(ConfigError, match="target_parameters"):
        inject_adapter_in_model(
            config(UP), mixture(), state_dict={"model.layers.0.mlp.experts.lora_A.weight": torch.ones(1)}
        )
    assert not faced(UP).supports_lora_conversion() and faced(GATE).supports_lora_conversion()


def test_mixed_batches_and_combinations_take_experts_and_routers_refuse_them_by_name():
    model = faced(UP, DOWN)
    model.add_adapter("linear", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    model.add_adapter("router", config(GATE, r=2))
    for value in adapters_of(model).named("linear").values():
        randomize(value)
    model.eval()
    with pytest.raises(StateError, match=r"'router', model.layers.0.mlp.gate.*set_adapter"):
        model(input_ids=IDS, adapter_names=["router", "__base__"])
    both = logits(model)
    mixed = model(input_ids=IDS, adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], both[0], atol=1e-5, rtol=1e-4)
    model.set_adapter("linear")
    want = logits(model)
    mixed = model(input_ids=IDS, adapter_names=["linear", "__base__"]).logits
    torch.testing.assert_close(mixed[0], want[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixed[1], logits(mixture())[1], atol=1e-5, rtol=1e-4)
    model.add_weighted_adapter(["default", "linear"], [1.0, 1.0], "sum")
    assert list(model.peft_config) == ["default", "linear", "router", "sum"]

"""What a layer answers under PEFT's names."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from minilora.errors import ConfigError, StateError
from minilora.many.intruders import reduce_intruder_dimension
from minilora.peft import (
    LoraConfig,
    LoraGAConfig,
    get_layer_status,
    get_peft_model,
    get_peft_model_state_dict,
    preprocess_loraga,
    set_peft_model_state_dict,
)
from minilora.peft.layers import LoraLayer
from minilora.peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from minilora.peft.utils.save_and_load import get_base_model_state_dict, set_base_model_state_dict
from tests.models import finished, llama, lora, mlp, randomize


def test_what_never_trains_has_a_name():
    model = get_peft_model(mlp(), lora(["first"], init_lora_weights="mica"))
    model.add_adapter("other", lora(["first", "last"]))
    layers = model.base_model.model
    assert layers.first.frozen_peft_weight_names == {"default": ("lora_B",)}
    assert layers.last.frozen_peft_weight_names == {}


def test_a_factor_without_a_bias_says_so():
    plain, biased = (get_peft_model(mlp(), lora(["last"], lora_bias=which)) for which in (False, True))
    assert plain.base_model.model.last.lora_B["default"].bias is None
    assert biased.base_model.model.last.lora_B["default"].bias.shape == (5,)
    assert {name for name, _ in biased.named_parameters()} - {name for name, _ in plain.named_parameters()} == {
        "base_model.model.last.lora_B.default.bias"
    }


@pytest.mark.parametrize("targets", [["lm_head", "v_proj"], r".*(lm_head|v_proj)"])
def test_a_head_that_is_to_stay_tied_takes_its_table_along(targets, tmp_path):
    model = get_peft_model(llama(tie_word_embeddings=True), lora(targets, ensure_weight_tying=True))
    layers = model.base_model.model
    table, head = layers.model.embed_tokens, layers.lm_head
    assert isinstance(table, LoraLayer) and isinstance(head, LoraLayer)
    assert table.lora_embedding_A["default"].data_ptr() == head.lora_B["default"].weight.data_ptr()
    ids = torch.tensor([[3, 9, 1]])
    wanted = randomize(model).eval()(ids).logits
    model.save_pretrained(tmp_path)
    from minilora.peft import PeftModel

    again = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
    torch.testing.assert_close(again(ids).logits, wanted)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_all_linear_leaves_a_head_alone_that_is_to_stay_tied():
    class Model(nn.Module):  # which does not say what its output embedding is
        def __init__(self):
            super().__init__()
            self.embed, self.mid, self.head = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 20, bias=False)
            self.head.weight = self.embed.weight

    with pytest.warns(UserWarning, match="no tied modules are added"):
        model = get_peft_model(Model(), LoraConfig(target_modules="all-linear", ensure_weight_tying=True))
    assert model.targeted_module_names == ["mid"]


def test_tied_rows_are_shown_at_every_table():
    model = get_peft_model(llama(tie_word_embeddings=True), lora(["v_proj"], trainable_token_indices=[3, 5]))
    layers = model.base_model.model
    own, tied = layers.model.embed_tokens.token_adapter, layers.lm_head.token_adapter
    assert isinstance(own, TrainableTokensLayer) and isinstance(tied, TrainableTokensLayer)
    assert tied.trainable_tokens_delta["default"] is own.trainable_tokens_delta["default"]
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad]
    assert sum("trainable_tokens_delta" in name for name in names) == 1


def test_lora_ga_beside_layers_that_have_no_gradients_directions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.conv, self.embed = nn.Linear(14, 20), nn.Conv2d(3, 8, 3), nn.Embedding(9, 14)

        def forward(self, x):
            return self.lin(x)

    model = finished(Model())
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["lin", "conv", "embed"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(),
    )
    x, image = torch.randn(2, 14), torch.randn(1, 3, 6, 6)
    wanted = model(x), model.conv(image)
    preprocess_loraga(model, config, lambda: model(x).square().sum().backward())
    adapted = get_peft_model(model, config)
    torch.testing.assert_close(adapted(x), wanted[0])
    torch.testing.assert_close(adapted.base_model.model.conv(image), wanted[1])  # it starts as plain LoRA
    assert not adapted.base_model.model.conv.lora_B["default"].weight.any()
    assert adapted.base_model.model.conv.lora_A["default"].weight.any()


def test_without_intruders_an_adapter_keeps_its_dtype():
    model = get_peft_model(mlp().bfloat16(), lora(["first"]), autocast_adapter_dtype=False)
    reduce_intruder_dimension(randomize(model), threshold_epsilon=999)
    layer = model.base_model.model.first
    assert {layer.lora_A[name].weight.dtype for name in ("default", "intruder_reduced")} == {torch.bfloat16}
    assert not torch.equal(layer.lora_B["default"].weight, layer.lora_B["intruder_reduced"].weight)


def test_types_can_be_compared_with_those_of_other_methods():
    from minilora.peft import PeftType

    model = get_peft_model(mlp(), lora(["first"]))
    for kind in (model.peft_type, model.peft_config["default"].peft_type):
        assert kind == PeftType.LORA and kind.value == "LORA" and kind not in (PeftType.ADALORA, PeftType.PREFIX_TUNING)
    theirs = pytest.importorskip("peft").PeftType
    assert {each.name: each.value for each in PeftType} == {each.name: each.value for each in theirs}


class Attends(nn.Module):
    """An attention and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mha, self.last = nn.MultiheadAttention(12, 3), nn.Linear(12, 5)

    def forward(self, x):
        return self.last(self.mha(x, x, x, need_weights=False)[0])


@pytest.mark.filterwarnings("ignore")  # of FSDP1, which torch will drop
@pytest.mark.parametrize(
    "fields", [{"target_modules": ["mha", "last"]}, {"target_modules": ["last"], "lora_bias": True}]
)
def test_under_fsdp1_a_model_computes_what_it_did(fields):
    """It puts tensors in the place of parameters, as plain attributes."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = randomize(get_peft_model(Attends(), LoraConfig(r=3, lora_alpha=7, **fields))).eval()
    x = torch.randn(4, 2, 12)
    wanted, values = model(x).detach(), get_peft_model_state_dict(model)
    values = {name: value.clone() for name, value in values.items()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        with torch.no_grad():
            torch.testing.assert_close(sharded(x), wanted, atol=1e-6, rtol=1e-5)
        found = get_peft_model_state_dict(sharded)
        assert found.keys() == values.keys()
        assert all(torch.equal(found[name], value) for name, value in values.items())
    finally:
        dist.destroy_process_group()


def test_a_merged_layer_moves_with_the_one_that_comes_back():
    model = randomize(get_peft_model(mlp(), lora(["first"]))).eval()
    x = torch.randn(3, 12)
    before = model(x)
    model.merge_adapter()
    assert model.base_model.model.first.get_base_layer().weight is model.base_model.model.first.base_layer.weight
    model.double().unmerge_adapter()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(x.double()).float(), before, atol=1e-6, rtol=1e-5)


def test_layers_are_listed_and_shown_as_in_peft():
    model = get_peft_model(mlp(), lora(["last"]))
    model.add_adapter("other", lora(["first", "last"], use_dora=True))
    assert [layer.name for layer in get_layer_status(model)] == ["model.first", "model.last"]
    layer = model.base_model.model.last
    assert repr(layer).startswith("lora.Linear(") and layer._all_available_adapter_names() == ["default", "other"]


def test_an_adapter_in_the_dtype_of_its_layer_is_all_in_it():
    fields = {"r": 3, "lora_alpha": 7, "target_modules": ["first"], "init_lora_weights": "mica"}
    model = get_peft_model(mlp().bfloat16(), LoraConfig(**fields), autocast_adapter_dtype=False)
    layer = model.base_model.model.first
    assert {layer.lora_A["default"].weight.dtype, layer.lora_B["default"].weight.dtype} == {torch.bfloat16}


def test_a_merged_adapter_takes_no_new_values():
    model, x = randomize(get_peft_model(mlp(), lora())), torch.randn(3, 12)
    unmerged, new = model.state_dict(), {k: v + 1 for k, v in get_peft_model_state_dict(model).items()}
    unmerged = {key: value.clone() for key, value in unmerged.items()}
    model.merge_adapter()
    wanted, base = model(x), {key: value + 1 for key, value in get_base_model_state_dict(model).items()}
    for change in (
        lambda: set_peft_model_state_dict(model, new),
        lambda: set_base_model_state_dict(model, base),
        lambda: model.load_state_dict(unmerged),
        lambda: model.base_model.set_adapter("default"),
    ):
        with pytest.raises(StateError, match=r"merged.*unmerge(_adapter\(\))? first"):
            change()
        assert torch.equal(model(x), wanted)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})  # the same values
    assert torch.equal(model(x), wanted)
    model.unmerge_adapter()
    assert all(torch.equal(value, unmerged[key]) for key, value in model.state_dict().items())
    set_peft_model_state_dict(model, new)
    assert not torch.allclose(model(x), wanted)


def test_what_is_no_name_is_refused_as_an_unknown_one():
    model = get_peft_model(mlp(), lora())
    for name in (None, 3, [], "nope"):
        for call in (
            model.delete_adapter,
            model.set_requires_grad,
            lambda name: get_peft_model_state_dict(model, None, name),
        ):
            if name == [] and call == model.set_requires_grad:
                continue  # no adapter at all: nothing to do
            with pytest.raises(StateError, match="default"):
                call(name)
    with pytest.raises(ConfigError, match="weights=None"):
        model.add_weighted_adapter(["default"], None, "sum")
    with pytest.raises(RuntimeError, match="state_dict for PeftModel"):
        model.load_state_dict({})

"""Switching, disabling, merging, taking out: what each does to the output, and that the base comes back to the bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilora import (
    LoraConfig,
    PeftModel,
    QuantConfig,
    QuantLinear,
    get_peft_model,
    inject,
    merge,
    quantize_model,
    set_adapter,
    unmerge,
)
from minilora.errors import MiniLoraError, StateError
from minilora.linear.layers import dense_weight
from minilora.lora.layer import LoRALinear
from minilora.lora.slot import own_parameters
from minilora.lora.slots import Adapters, Block, adapters_of, has_adapters
from minilora.many.adapted import count_parameters, delete_adapter, disabled, unload
from tests.models import adapted_paths, lora


@pytest.fixture
def two(make_mlp, randomize):
    """A model with adapters "one" (on all three layers) and "two" (of another rank, on two layers); "two" is active."""
    model = make_mlp()
    inject(model, lora(), "one")
    randomize(model, 1)
    inject(model, lora(["first", "mid"], r=2, lora_alpha=3), "two")
    return randomize(model, 2)


def trained(model):
    return {path for path, parameter in model.named_parameters() if parameter.requires_grad}


def dense_model(make_mlp, model, names):
    """The bare MLP with ``W + sum of scaling * B A`` in its weights, in plain torch."""
    bare = make_mlp()
    for path, slot in model._minilora_adapters.slots.items():
        layer = bare.get_submodule(path)
        for adapter in (slot.kept[name] for name in names if name in slot.kept):
            delta = adapter.scaling * adapter.lora_B @ adapter.lora_A
            layer.weight.data += delta.detach() if isinstance(layer, nn.Linear) else delta.detach().t()
    return bare


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [["one"], ["two"], ["one", "two"], ["two", "one"]])
def test_active_adapters_add_up(two, make_mlp, x, names):
    set_adapter(two, names)
    close(two(x), dense_model(make_mlp, two, names)(x))
    assert not torch.allclose(two(x), make_mlp()(x), atol=1e-2)


@pytest.mark.parametrize("names", [["one"], ["two"], ["one", "two"]])
def test_exactly_the_active_adapters_train(two, names):
    set_adapter(two, names)
    for slot in two._minilora_adapters.slots.values():
        for name, value in slot.kept.items():
            assert all(p.requires_grad is (name in names) for p in own_parameters(value)), name
    assert all(path.endswith(("lora_A", "lora_B")) for path in trained(two))


def test_gradients_reach_every_active_adapter(two, x):
    set_adapter(two, ["one", "two"])
    two(x).square().sum().backward()
    grads = [p.grad for p in two.parameters() if p.requires_grad]
    assert len(grads) == 10 and all(grad is not None and grad.abs().max() > 0 for grad in grads)


def test_switching_back_gives_the_same_bits(two, x):
    before = two(x)
    for names in ("one", ["two", "one"], "two"):
        set_adapter(two, names)
    assert torch.equal(two(x), before)


@pytest.mark.parametrize("names", ["three", ["one", "three"], ["one", "one"]], ids=str)
def test_switching_to_what_cannot_be_active_changes_nothing(two, snapshot, x, names):
    before, want = snapshot(two), two(x)
    with pytest.raises(StateError):
        set_adapter(two, names)
    assert snapshot(two) == before and torch.equal(two(x), want)


def test_unknown_adapter_names_the_known_ones(two):
    with pytest.raises(StateError, match="no adapter is called 'tow'; there are 'two'"):
        set_adapter(two, "tow")


@pytest.mark.parametrize("call", [merge, unmerge, unload, count_parameters, lambda model: set_adapter(model, "a")])
def test_a_bare_model_says_how_to_get_adapters(make_mlp, call):
    with pytest.raises(StateError, match=r"MLP has no adapters; call minilora\.inject\(model, LoraConfig"):
        call(make_mlp())


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_is_the_bare_model_to_the_bit(two, make_mlp, snapshot, x, merged):
    if merged:
        merge(two)
    before, want = snapshot(two), two(x)
    with disabled(two):
        assert torch.equal(two(x), make_mlp()(x)) and not adapted_paths(two)
        with disabled(two):
            assert torch.equal(two(x), make_mlp()(x))
    assert snapshot(two) == before and torch.equal(two(x), want)


def test_disabled_inside_disabled_stays_disabled(two, make_mlp, x):
    with disabled(two):
        with disabled(two):
            pass
        assert torch.equal(two(x), make_mlp()(x))


def test_disabled_covers_biases_and_saved_modules(make_mlp, randomize, x):
    model = randomize(inject(make_mlp(), lora(["first"], bias="all", modules_to_save=["last"])))
    want = model(x)
    with disabled(model):
        assert torch.equal(model(x), make_mlp()(x))
    assert torch.equal(model(x), want) and not torch.equal(want, make_mlp()(x))


def test_an_error_inside_disabled_brings_the_adapters_back(two, snapshot):
    before = snapshot(two)
    with pytest.raises(KeyError), disabled(two):
        raise KeyError
    assert snapshot(two) == before


@pytest.mark.parametrize("names", [None, ["one"], ["one", "two"]], ids=str)
def test_merging_is_the_sum_in_the_weights(two, make_mlp, x, names):
    set_adapter(two, names or "two")
    before = two(x)
    merge(two, names)
    close(two(x), before)
    close(two(x), dense_model(make_mlp, two, names or ["two"])(x))
    assert not any(adapter in adapted_paths(two) for adapter in ("first", "mid"))


def test_what_is_active_but_not_merged_stays_on_top(two, make_mlp, x):
    set_adapter(two, ["one", "two"])
    before = two(x)
    merge(two, ["one"])
    assert len(adapted_paths(two)) == 2
    close(two(x), before)
    unmerge(two)
    assert torch.equal(two(x), before)


def test_a_second_merge_holds_nothing_of_the_first(two, make_mlp, x):
    merge(two, ["one"])  # on three layers
    unmerge(two)
    merge(two, ["two"])  # on two of them
    close(two(x), dense_model(make_mlp, two, ["two"])(x))


def test_merging_leaves_the_originals_alone(two, make_mlp):
    bases = {path: slot.base for path, slot in two._minilora_adapters.slots.items()}
    merge(two)
    want = make_mlp()
    for path, base in bases.items():
        assert torch.equal(base.weight, want.get_submodule(path).weight)
        assert torch.equal(base.bias, want.get_submodule(path).bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merged_weights_are_summed_in_fp32_and_rounded_once(two, make_mlp, dtype):
    model = two.to(dtype)
    for slot in model._minilora_adapters.slots.values():
        slot.base.to(dtype)
        for adapter in slot.kept.values():
            adapter.lora_A.data, adapter.lora_B.data = adapter.lora_A.data.float(), adapter.lora_B.data.float()
    merge(model, ["one", "two"])
    for path, slot in model._minilora_adapters.slots.items():
        delta = torch.stack([adapter.delta_weight() for adapter in slot.kept.values()]).sum(0)
        want = dense_weight(make_mlp().to(dtype).get_submodule(path)).float() + delta
        assert torch.equal(dense_weight(model.get_submodule(path)), want.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_twenty_merges_change_no_bit(make_mlp, randomize, snapshot, x, dtype):
    model = make_mlp().to(dtype)
    inject(model, lora(bias="lora_only"))
    randomize(model)
    before, want = snapshot(model), model(x.to(dtype))
    for _ in range(20):
        merge(model)
        unmerge(model)
    assert snapshot(model) == before and torch.equal(model(x.to(dtype)), want)


def test_merging_twice_or_the_unknown_changes_nothing(two, snapshot, x):
    with pytest.raises(StateError, match="no adapter is called 'three'"):
        merge(two, ["two", "three"])
    with pytest.raises(StateError, match="no adapter is merged, so there is nothing to unmerge; call merge first"):
        unmerge(two)
    merge(two)
    before, want = snapshot(two), two(x)
    with pytest.raises(StateError, match=r"adapters \['two'\] are merged already; call unmerge first"):
        merge(two, ["two"])
    assert snapshot(two) == before and torch.equal(two(x), want)


def test_merging_adds_to_what_is_merged(two, make_mlp, snapshot, x):
    before = snapshot(two)
    merge(two)
    merge(two, ["one"])
    assert adapters_of(two).merged == ("two", "one")
    close(two(x), dense_model(make_mlp, two, ["two", "one"])(x))
    unmerge(two)
    assert snapshot(two) == before


@pytest.mark.parametrize("active", ["one", ["one", "two"]], ids=str)
def test_a_merge_that_fails_half_way_changes_nothing(two, snapshot, x, monkeypatch, active):
    set_adapter(two, active)
    before, want = snapshot(two), two(x)
    plain, calls = LoRALinear.delta_weight, []

    def fails_at_the_end(adapter):
        calls.append(adapter)
        if len(calls) == 3:
            raise StateError("the update depends on the input")
        return plain(adapter)

    monkeypatch.setattr(LoRALinear, "delta_weight", fails_at_the_end)
    with pytest.raises(StateError, match="depends on the input"):
        merge(two)
    monkeypatch.undo()
    assert torch.equal(two(x), want) and snapshot(two) == before
    merge(two)
    close(two(x), want)


def test_a_merge_that_overflows_is_refused_by_layer(make_mlp, snapshot):
    model = make_mlp().half()
    inject(model, lora())
    with torch.no_grad():
        for factor in (model.mid.lora_A, model.mid.lora_B):
            factor.fill_(200.0)  # 3 * 200 * 200 * 4 is beyond the largest half
    before = snapshot(model)
    with pytest.raises(MiniLoraError, match="mid"):
        merge(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_a_packed_base_merges_to_dense_and_comes_back(make_mlp, randomize, snapshot, x, double):
    model = quantize_model(make_mlp(), QuantConfig(double_quant=double))
    randomize(inject(model, lora()))
    before, want = snapshot(model), model(x)
    merge(model)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    close(model(x), want)
    unmerge(model)
    assert snapshot(model) == before and torch.equal(model(x), want)


def test_get_peft_model_is_the_same_object_of_an_extended_class(make_mlp):
    model = make_mlp()
    old = type(model)
    got = get_peft_model(model, lora())
    assert got is model and isinstance(got, old) and isinstance(got, PeftModel) and type(got) is not old
    assert type(got).__name__ == old.__name__ and type(got).__module__ == old.__module__
    plain = got.get_base_model()
    assert type(plain) is old and plain.__dict__ is got.__dict__
    assert got.active_adapter == "default" and got.active_adapters == ["default"]
    assert got.peft_config == {"default": lora()}


@pytest.mark.parametrize("merged_before", [False, True])
def test_merge_and_unload_gives_the_plain_object_with_the_update_inside(make_mlp, randomize, x, merged_before):
    model = make_mlp()
    old = type(model)
    randomize(get_peft_model(model, lora(["first", "mid"], bias="lora_only", modules_to_save=["last"])))
    want = model(x)
    if merged_before:
        model.merge_adapter()
    got = model.merge_and_unload()
    assert got is model and type(got) is old and not has_adapters(got) and not adapted_paths(got)
    assert sorted(got.state_dict()) == sorted(make_mlp().state_dict())
    assert got.__dict__.keys() == make_mlp().__dict__.keys()
    close(got(x), want)
    get_peft_model(got, lora())  # a plain model again


def test_merge_and_unload_takes_the_named_adapter_whichever_is_active(make_mlp, randomize, x):
    model = randomize(get_peft_model(make_mlp(), lora(), "one"), 1)
    randomize(inject(model, lora(["first", "mid"], r=2, lora_alpha=3), "two"), 2)
    want = dense_model(make_mlp, model, ["one"])(x)
    close(model.merge_and_unload(adapter_names=["one"])(x), want)


def test_merge_and_unload_of_another_adapter_than_is_merged_is_refused(make_mlp):
    model = get_peft_model(make_mlp(), lora(), "one")
    inject(model, lora(), "two")
    model.merge_adapter(["one"])
    with pytest.raises(StateError):
        model.merge_and_unload(adapter_names=["two"])
    assert model.active_adapters == ["two"]


def test_unload_gives_the_exact_base(make_mlp, randomize, snapshot):
    model = make_mlp()
    before = snapshot(model)
    randomize(get_peft_model(model, lora(["first", "mid"], bias="all", modules_to_save=["last"])))
    assert snapshot(model) != before
    assert model.unload() is model
    after = snapshot(model)
    assert [after[part] == before[part] for part in ("class", "attributes", "places", "tensors")] == [True] * 4
    assert [row[:2] for row in after["trains"]] == [row[:2] for row in before["trains"]]


def extend_as_fsdp2(model):
    """What ``fully_shard`` does to the class of a module that it shards."""
    front = type("FSDPModule", (), {"reshard": lambda self: None})
    model.__class__ = type(f"FSDP{type(model).__name__}", (front, type(model)), {})


@pytest.mark.parametrize("how", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_class_that_another_library_extended_is_not_restored(make_mlp, randomize, snapshot, x, how, merged):
    model = randomize(get_peft_model(make_mlp(), lora(["first", "mid"], bias="lora_only")))
    if merged:
        model.merge_adapter()
    mine = type(model)
    extend_as_fsdp2(model)
    theirs, before, want = type(model), snapshot(model), model(x)
    with pytest.raises(
        StateError, match=r"^FSDP\w+: its class was extended after get_peft_model \(FSDP2 does so\), .*; unload"
    ) as told:
        getattr(model, how)()
    assert "\n" not in str(told.value) and type(model) is theirs
    assert snapshot(model) == before and torch.equal(model(x), want)
    unload(model)  # the way out
    assert type(model) is theirs and torch.equal(model(x), make_mlp()(x))
    model.__class__ = mine
    get_peft_model(model, lora())
    assert getattr(model, how)() is model and type(model) is type(make_mlp())


def test_unload_drops_what_is_merged(make_mlp, randomize, x):
    model = randomize(get_peft_model(make_mlp(), lora(bias="all")))
    model.merge_adapter()
    assert torch.equal(model.unload()(x), make_mlp()(x))


@pytest.mark.parametrize("merged", [False, True])
def test_deepcopy_is_independent(two, make_mlp, randomize, snapshot, x, merged):
    if merged:
        merge(two)
    twin, want, before = copy.deepcopy(two), two(x), snapshot(two)
    assert torch.equal(twin(x), want)
    if merged:
        unmerge(twin)
    set_adapter(twin, ["one", "two"])
    randomize(twin, 9)
    for slot in twin._minilora_adapters.slots.values():
        slot.base.weight.data.zero_()
    assert not torch.equal(twin(x), want)
    assert snapshot(two) == before and torch.equal(two(x), want)
    with disabled(twin):
        assert torch.equal(two(x), want)


def test_deepcopy_of_a_peft_model_keeps_its_methods(make_mlp, randomize, x):
    model = randomize(get_peft_model(make_mlp(), lora()))
    twin = copy.deepcopy(model)
    twin.merge_and_unload()
    assert type(twin) is type(make_mlp()) and adapted_paths(model) == ["first", "mid", "last"]
    close(twin(x), model(x))


LINE = "trainable params: 512 || all params: 8,640 || trainable%: 5.9259\n"


def test_print_trainable_parameters_has_the_words_of_peft(make_gpt2, capsys):
    model = get_peft_model(make_gpt2(), LoraConfig(r=4, lora_alpha=12))
    model.print_trainable_parameters()
    assert capsys.readouterr().out == LINE


def test_count_is_the_same_whatever_sits_in_the_slots(make_gpt2, capsys):
    model = get_peft_model(make_gpt2(), LoraConfig(r=4, lora_alpha=12, bias="lora_only"))
    every = model.get_nb_trainable_parameters()[1]
    assert every == 8640
    with model.disable_adapter():
        assert model.get_nb_trainable_parameters()[1] == every
    model.merge_adapter()
    assert model.get_nb_trainable_parameters()[1] == every
    model.unmerge_adapter()
    assert model.get_nb_trainable_parameters()[1] == every


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_a_packed_weight_counts_as_the_weights_it_stands_for(make_llama, double):
    dense = make_llama(intermediate_size=128)
    packed = quantize_model(copy.deepcopy(dense), QuantConfig(double_quant=double))
    for model in (dense, packed):
        get_peft_model(model, LoraConfig(r=4, lora_alpha=12))
        assert model.get_nb_trainable_parameters() == (1792, 84032)


def test_count_with_two_adapters_and_copies(make_mlp):
    model = make_mlp()
    base = sum(p.numel() for p in model.parameters())
    inject(model, lora(["first"], modules_to_save=["last"]), "one")
    first, copied = 3 * (12 + 20), 14 * 5 + 5
    assert count_parameters(model) == (first + copied, base + first + copied)
    inject(model, lora(["mid"]), "two")
    assert count_parameters(model) == (3 * (20 + 14), base + first + copied + 3 * (20 + 14))


@pytest.mark.parametrize("trainable", [False, True])
def test_loaded_adapters_stay_as_frozen_as_they_were(make_mlp, randomize, tmp_path, trainable):
    saved = randomize(get_peft_model(make_mlp(), lora(["first"], bias="all", modules_to_save=["last"])))
    saved.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(make_mlp(), tmp_path, is_trainable=trainable)
    want = trained(saved) if trainable else set()
    assert trained(model) == want and model.training is trainable
    with model.disable_adapter():
        pass
    assert trained(model) == want
    model.merge_adapter()
    model.unmerge_adapter()
    assert trained(model) == want


def test_from_pretrained_says_which_argument_comes_first(make_mlp):
    with pytest.raises(StateError, match=r"got a str first; wanted the loaded base model"):
        PeftModel.from_pretrained("a/folder", make_mlp())


def test_the_stacked_layer_obeys_the_law(two, x):
    set_adapter(two, ["one", "two"])
    outer = two.first
    weight = dense_weight(outer.innermost) + outer.delta_weight() + outer.base_layer.delta_weight()
    close(outer(x), F.linear(x, weight, outer.bias))


# ---- merging, what it says and what it refuses


def test_no_name_at_all_is_refused(two, snapshot):
    before = snapshot(two)
    with pytest.raises(StateError, match="no adapter is named; name one"):
        set_adapter(two, [])
    with pytest.raises(StateError, match="no adapter is active, so there is nothing to merge"):
        merge(two, [])
    assert snapshot(two) == before


def test_a_single_name_is_taken_as_it_is(two, make_mlp, x):
    merge(two, "one")
    assert two._minilora_adapters.merged == ("one",)
    unmerge(two)
    close(two(x), dense_model(make_mlp, two, ["two"])(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["one", "two"])
def test_an_adapter_that_is_not_finite_is_not_merged(two, snapshot, name, value):
    set_adapter(two, ["one", "two"])
    with torch.no_grad():
        two._minilora_adapters.slots["mid"].kept[name].lora_A[-1, -1] = value
    before = snapshot(two)
    with pytest.raises(
        StateError, match=f"mid: NaNs detected in the merged weights. The adapter {name} seems to be broken"
    ):
        merge(two)
    assert snapshot(two) == before
    merge(two, ["one" if name == "two" else "two"])


def test_a_base_that_is_not_finite_is_named(make_mlp, randomize, snapshot):
    model = randomize(inject(make_mlp(), lora()))
    model.mid.base_layer.weight.data[3, 2] = float("nan")
    before = snapshot(model)
    with pytest.raises(StateError, match=r"mid: its base weight holds NaN or infinity.*load it again"):
        merge(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("bias", [False, True])
def test_a_trained_bias_of_b_goes_into_the_bias_or_becomes_one(randomize, bias):
    torch.manual_seed(0)
    model = nn.ModuleDict({"fc": nn.Linear(12, 20, bias=bias)}).eval()
    for seed, name in enumerate(("one", "two")):
        randomize(inject(model, lora(["fc"], lora_bias=True), name), seed)
    set_adapter(model, ["one", "two"])
    x = torch.randn(3, 12)
    want = model["fc"](x)
    merge(model)
    close(model["fc"](x), want)
    assert type(model["fc"]) is nn.Linear
    unmerge(model)
    assert torch.equal(model["fc"](x), want)


@pytest.mark.parametrize("spoiled", ["weight", "bias"])
def test_what_overflows_is_refused_be_it_weight_or_bias(randomize, snapshot, spoiled):
    torch.manual_seed(0)
    model = nn.ModuleDict({"fc": nn.Linear(12, 20)}).half().eval()
    randomize(inject(model, lora(["fc"], lora_bias=True)))
    with torch.no_grad():
        (model["fc"].lora_bias if spoiled == "bias" else model["fc"].lora_B).mul_(1e6)
    before = snapshot(model)
    with pytest.raises(StateError, match=r"fc: the merged weight overflows torch\.float16; load the model in bfloat16"):
        merge(model)
    assert snapshot(model) == before


def test_the_report_is_the_share_of_the_update_that_survives(make_mlp, randomize):
    model = make_mlp().bfloat16()
    randomize(inject(model, lora()))
    model.last.lora_B.data.zero_()
    bases = {path: dense_weight(slot.base).double() for path, slot in model._minilora_adapters.slots.items()}
    updates = {path: model.get_submodule(path).delta_weight().detach().double() for path in bases}
    report = merge(model)
    errors = {path: dense_weight(model.get_submodule(path)).double() - bases[path] - updates[path] for path in bases}
    want = {path: 1 - float(errors[path].norm() / updates[path].norm()) for path in ("first", "mid")}
    assert report.layers == pytest.approx(want | {"last": 1.0}, abs=1e-5) and 0.9 < want["first"] < 0.9999
    total = sum(float(e.square().sum()) for e in errors.values()) / sum(
        float(u.square().sum()) for u in updates.values()
    )
    assert report.survived == pytest.approx(1 - total**0.5, abs=1e-5) and report.into == "bfloat16"
    worst = min(report.layers, key=report.layers.get)
    assert str(report) == (
        f"merged into 3 layers as bfloat16: {report.survived:.1%} of the update survives rounding; "
        f"least in {worst}: {report.layers[worst]:.1%}"
    )


def test_an_update_that_rounding_swallows_survives_not_at_all(make_mlp, randomize):
    model = make_mlp().bfloat16()
    randomize(inject(model, lora(["first"])))
    model.first.lora_B.data.mul_(1e-9)
    report = merge(model)
    assert report.survived == report.layers["first"] == 0.0


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_requantizing_keeps_the_format_and_says_what_it_cost(make_mlp, randomize, snapshot, x, double):
    how = QuantConfig("nf3", blocksize=32, double_quant=double)
    model = quantize_model(make_mlp(), how)
    randomize(inject(model, lora()))
    before = snapshot(model)
    report = merge(model, requantize=True)
    for path in ("first", "mid", "last"):
        layer = model.get_submodule(path)
        assert isinstance(layer, QuantLinear) and not layer.training
        assert (layer.format, layer.blocksize, layer.double_quant) == ("nf3", 32, double)
    assert report.into == "nf3" and 0.2 < report.survived < 0.95
    unmerge(model)
    assert snapshot(model) == before
    assert merge(model).into == "float32"


def test_a_dense_layer_is_not_packed_by_requantize(two):
    assert merge(two, requantize=True).into == "float32"
    assert isinstance(two.first, nn.Linear)


def test_layers_that_share_a_weight_share_the_merged_one(make_gpt2, randomize, ids):
    model = randomize(inject(make_gpt2(), lora(["wte"], ensure_weight_tying=True)))
    want = model(ids).logits
    merge(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    close(model(ids).logits, want)
    unmerge(model)
    assert torch.equal(model(ids).logits, want)


def test_layers_that_share_nothing_stay_apart(two):
    merge(two, ["one"])
    assert len({id(layer.weight) for layer in (two.first, two.mid, two.last)}) == 3


def test_a_weight_that_another_layer_shares_is_not_merged(randomize, snapshot):
    torch.manual_seed(0)
    model = nn.ModuleDict({"fc": nn.Linear(12, 20), "twin": nn.Linear(12, 20)})
    model["twin"].weight = model["fc"].weight
    randomize(inject(model, lora(["fc"])))
    before = snapshot(model)
    with pytest.raises(
        StateError, match=r"fc shares its weight with twin, which would not change; call minilora\.untie"
    ):
        merge(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("training", [False, True])
def test_a_merged_layer_is_in_the_mode_of_its_model(two, training):
    two.train(training)
    merge(two)
    assert all(module.training is training for module in two.modules())


def test_deleting_leaves_the_others(two, make_mlp, snapshot, x):
    before = snapshot(two)
    with pytest.raises(StateError, match="Adapter three does not exist; there are 'one', 'two'"):
        delete_adapter(two, "three")
    assert snapshot(two) == before
    delete_adapter(two, "two")
    assert two._minilora_adapters.active == ("one",) and trained(two) == {
        f"{path}.{name}" for path in ("first", "mid", "last") for name in ("lora_A", "lora_B")
    }
    close(two(x), dense_model(make_mlp, two, ["one"])(x))
    delete_adapter(two, "one")
    assert adapters_of(two).configs == {} and adapters_of(two).active == () and not adapted_paths(two)
    close(two(x), make_mlp()(x))
    inject(two, lora(["last"]), "new")
    assert adapters_of(two).active == ("new",)


def test_deleting_one_of_several_active_ones_keeps_the_rest(two, make_mlp, randomize, x):
    inject(two, lora(["last"]), "a-third", activate=False)
    set_adapter(two, ["two", "one"])
    delete_adapter(two, "two")
    assert two._minilora_adapters.active == ("one",)
    delete_adapter(two, "one")
    assert two._minilora_adapters.active == ("a-third",)


def test_deleting_what_is_merged_is_refused(two, snapshot):
    merge(two)
    before = snapshot(two)
    with pytest.raises(
        StateError, match=r"Cannot delete adapter\(s\) \['two'\] while they are merged. Please unmerge them first."
    ):
        delete_adapter(two, "two")
    assert snapshot(two) == before
    delete_adapter(two, "one")
    assert two._minilora_adapters.merged == ("two",)


def test_the_first_by_name_of_the_others_becomes_active(two):
    inject(two, lora(["last"]), "a-third", activate=False)
    delete_adapter(two, "two")
    assert two._minilora_adapters.active == ("a-third",)


@pytest.mark.parametrize("kept", [False, True])
def test_unloading_takes_out_or_keeps_what_is_merged(two, make_mlp, x, kept):
    merge(two, ["one", "two"])
    want = two(x) if kept else make_mlp()(x)
    assert unload(two, keep_merged=kept) is two
    assert torch.equal(two(x), want) and not adapted_paths(two) and not has_adapters(two)


def test_each_update_is_asked_for_on_the_bare_layer(two, monkeypatch):
    """Not on another adapter, or on a layer that was merged before: a variant may read the base weight."""
    set_adapter(two, ["one", "two"])
    plain, asked = LoRALinear.delta_weight, []

    def watched(adapter):
        asked.append(adapter.base_layer)
        return plain(adapter)

    monkeypatch.setattr(LoRALinear, "delta_weight", watched)
    merge(two)
    bases = [slot.base for slot in two._minilora_adapters.slots.values()]
    assert len(asked) == 5 and all(any(layer is base for base in bases) for layer in asked)


def test_a_merge_that_cannot_be_shown_leaves_nothing_merged(two, snapshot, x, monkeypatch):
    before, want, plain, failed = snapshot(two), two(x), Adapters.settle, []

    def settle(self, change):
        plain(self, change)
        if self.merged and not failed:
            failed.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(Adapters, "settle", settle)
    with pytest.raises(KeyboardInterrupt):
        merge(two)
    assert snapshot(two) == before and torch.equal(two(x), want)
    record = two._minilora_adapters
    assert failed and record.merged == () and all(slot.merged is None for slot in record.slots.values())
    merge(two)
    close(two(x), want)


@pytest.mark.parametrize(
    "call", [unload, lambda model: delete_adapter(model, "two"), merge], ids=["unload", "delete", "merge"]
)
def test_nothing_is_taken_out_under_a_batch_that_mixes(two, snapshot, call):
    record, before = two._minilora_adapters, snapshot(two)
    record.blocks = (Block(mixes=True),)
    with pytest.raises(StateError, match="a batch that mixes adapters is running"):
        call(two)
    record.blocks = ()
    assert snapshot(two) == before and record.active == ("two",) and record.merged == ()
    assert list(record.configs) == ["one", "two"]

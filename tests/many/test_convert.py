"""Any update as a plain LoRA; scalings that are changed for a while; norms of DoRA that are kept; frozen weights in half precision."""

import pytest
import torch
from torch import nn

import minilora
from minilora import LoraConfig, QuantConfig, inject, quantize_model, set_adapter
from minilora.errors import ConfigError, KindError, StateError
from minilora.lora.slots import adapters_of
from minilora.lora.variants import dora
from minilora.lora.variants.dora import DoraCaching
from minilora.many.adapted import disabled
from minilora.many.convert import convert_to_lora, save_as_lora, supports_lora_conversion
from minilora.many.scaling import rescale_adapter_scale, scale_layer, set_scale, unscale_layer
from minilora.store.load import adapter_state_dict, fill_adapter
from minilora.training.precision import cast_mixed_precision_params
from tests.compare import close, same, snapshot
from tests.models import lora


def made(make_mlp, randomize, variant=None, **fields):
    return randomize(inject(make_mlp(), lora(**fields), variant=variant))


VARIANTS = {
    "vera": ("vera", {}),
    "lora_xs": ("lora_xs", {}),
    "dora": (None, {"use_dora": True}),
    "pissa": (None, {"init_lora_weights": "pissa"}),
}


@pytest.mark.parametrize(("variant", "fields"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("rank", [2, 5, 0.5, 0.95, 1.0])
def test_a_conversion_is_the_best_update_of_its_rank(make_mlp, randomize, x, variant, fields, rank, tmp_path):
    model = made(make_mlp, randomize, variant, **fields)
    before = snapshot(model)
    config, tensors = convert_to_lora(model, rank)
    assert snapshot(model) == before and config.variant == "lora"
    again = inject(make_mlp(), config)
    fill_adapter(again, tensors)
    for path, value in adapters_of(model).named("default").items():
        want = value.delta_weight().double()
        U, S, Vh = torch.linalg.svd(want, full_matrices=False)
        r = config.for_module(path)[0]
        if isinstance(rank, float):
            energy = S.square()
            enough = rank * energy.sum() * (1 - 1e-9)
            assert energy[:r].sum() >= enough and (r == 1 or energy[: r - 1].sum() < enough)
        else:
            assert r == rank
        got = adapters_of(again).named("default")[path]
        close(got.delta_weight(), U[:, :r] * S[:r] @ Vh[:r], 1e-4)
        assert got.scaling == 1
    save_as_lora(tmp_path, model, rank)
    loaded = make_mlp()
    minilora.load_adapter(loaded, tmp_path)
    assert same(adapter_state_dict(loaded), adapter_state_dict(again)) and torch.equal(loaded(x), again(x))


def test_a_conversion_of_an_embedding_with_a_copy_beside_it(randomize):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 9), nn.Linear(9, 5)).eval()

    model = randomize(inject(base(), lora(["0", "1"], modules_to_save=["2"])))
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        config, tensors = convert_to_lora(model, 3)
    again = inject(base(), config)
    fill_adapter(again, tensors)
    close(again(torch.arange(11)), model(torch.arange(11)), 1e-4)


def test_a_conversion_says_what_it_cannot_do(make_mlp, randomize, capsys):
    with pytest.raises(KindError, match="Could not detect any layer that supports LoRA conversion") as caught:
        convert_to_lora(make_mlp(), 8)
    assert isinstance(caught.value, TypeError)
    model = made(make_mlp, randomize, "vera")
    for rank, said in (
        (123.0, "between 0 and 1 but got 123.0"),
        (-0.5, "between 0 and 1 but got -0.5"),
        (0, "Passing a rank of 0 doesn't make sense"),
        (-1, "rank=-1"),
        (True, "rank=True"),
        (99, r"The chosen rank 99 is larger than the weight shape \(\d+\), please choose a lower rank"),
    ):
        with pytest.raises(ConfigError, match=said):
            convert_to_lora(model, rank)
    with pytest.raises(StateError, match="no adapter is called 'other'"):
        convert_to_lora(model, 2, "other")
    convert_to_lora(model, 2, progressbar=True)
    assert "Converting to LoRA: first (1 of 3)" in capsys.readouterr().out
    assert supports_lora_conversion(model)
    biased = made(make_mlp, randomize, lora_bias=True)
    assert not supports_lora_conversion(biased)
    with pytest.raises(KindError, match="do not support LoRA conversion: LoRALinear"):
        convert_to_lora(biased, 2)
    with pytest.raises(StateError, match=r"trains first\.bias too"):
        convert_to_lora(made(make_mlp, randomize, bias="lora_only"), 2)


# ---- scaling


def updates(model):
    return {path: value.delta_weight() for path, value in adapters_of(model).named("a").items()}


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"init_lora_weights": "pissa"}], ids=str)
@pytest.mark.parametrize("factor", [0, 0.5, -2])
def test_a_scaling_is_another_one_for_a_while(make_mlp, randomize, x, fields, factor):
    model = inject(make_mlp(), lora(**fields), "a")
    randomize(model)
    inject(model, lora(), "b")
    set_adapter(model, "a")
    want, before, plain = updates(model), model(x), make_mlp()(x)
    with rescale_adapter_scale(model, factor):
        for path, update in updates(model).items():
            torch.testing.assert_close(update, factor * want[path])
        if factor == 0:
            close(model(x), plain)
    assert torch.equal(model(x), before)
    with pytest.raises(RuntimeError, match="inside"), rescale_adapter_scale(model, factor):
        raise RuntimeError("inside")
    assert torch.equal(model(x), before)


def test_a_factor_that_cannot_be_meant(make_mlp):
    model = inject(make_mlp(), lora())
    for factor, kind in (("a", KindError), (None, KindError), (float("nan"), ConfigError), (True, KindError)):
        with pytest.raises(kind, match="multiplier="), rescale_adapter_scale(model, factor):
            pass
    for other in (make_mlp(), inject(make_mlp(), lora(), variant="vera")):
        with pytest.raises(StateError, match="scaling is only supported for"), rescale_adapter_scale(other, 2):
            pass
    with pytest.raises(KindError, match="a Linear has no scaling"):
        scale_layer(nn.Linear(2, 3), 2)


def test_the_scaling_of_a_layer(make_mlp):
    layer = inject(make_mlp(), lora(r=3, lora_alpha=12)).first
    scale_layer(layer, 2)
    scale_layer(layer, 3)
    assert layer.scaling == 24
    set_scale(layer, 0.5)
    assert layer.scaling == 2
    unscale_layer(layer, 4)
    assert layer.scaling == 0.5
    with pytest.raises(ConfigError, match="scale=0"):
        unscale_layer(layer, 0)
    unscale_layer(layer)
    assert layer.scaling == 4


# ---- DoRA's norms


def test_norms_are_computed_once_until_a_number_changes(make_mlp, randomize, x, monkeypatch):
    model = made(make_mlp, randomize, use_dora=True)
    counts = []
    norms = dora.DoRALinear.row_norms
    monkeypatch.setattr(dora.DoRALinear, "row_norms", lambda self: counts.append(1) or norms(self))
    want = model(x)
    assert len(counts) == 3
    with DoraCaching():
        for _ in range(3):
            assert torch.equal(model(x), want)
        assert len(counts) == 6
        with DoraCaching(enabled=False):
            model(x)
            assert len(counts) == 9
        model(x)
        assert len(counts) == 12, "what was switched off was forgotten"
        with torch.no_grad():
            model.first.lora_B.mul_(2)
        changed = model(x)
        assert len(counts) == 13 and not torch.equal(changed, want)
        model.train()(x)
        assert len(counts) == 16
    assert torch.equal(model.eval()(x), changed)
    DoraCaching()(enabled=True)
    try:
        model(x), model(x)
        assert len(counts) == 22
    finally:
        DoraCaching()(enabled=False)
    assert not dora._caching


def test_kept_norms_give_the_same_gradients(make_mlp, randomize, x):
    model = made(make_mlp, randomize, use_dora=True)
    want = torch.autograd.grad(model(x).square().sum(), model.first.lora_magnitude_vector)[0]
    with DoraCaching():
        for _ in range(2):
            got = torch.autograd.grad(model(x).square().sum(), model.first.lora_magnitude_vector)[0]
            assert torch.equal(got, want)


# ---- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_frozen_becomes_half_and_what_trains_is_full(dtype):
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    quantize_model(model, QuantConfig(), target_modules=["0"])
    inject(model, LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"]))
    model[1].lora_A.data = model[1].lora_A.data.to(dtype)
    model[1].base_layer.bias.data = model[1].base_layer.bias.data.double()
    cast_mixed_precision_params(model, dtype)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert kinds["1.lora_A"] == kinds["0.lora_B"] == torch.float32
    assert kinds["1.base_layer.weight"] == kinds["1.base_layer.bias"] == dtype
    assert kinds["0.base_layer.weight"] == torch.uint8
    with pytest.raises(ConfigError, match=r"dtype=torch\.int8"):
        cast_mixed_precision_params(model, torch.int8)
    with disabled(model):
        pass

"""What an adapter learnt: the short ways agree with dense linear algebra, and every parameter is counted once."""

import math

import pytest
import torch
from torch import nn

from minilora import Adapter, LoraConfig, QuantConfig, get_peft_model, inject, quantize_model, set_adapter
from minilora.errors import StateError
from minilora.linear.layers import dense_weight
from minilora.lora.layer import LoRALinear
from minilora.report.inspect import adapters_in, memory_table, parameter_table, spectrum, update_ratios

SHAPES = [(12, 20), (20, 12), (16, 16), (3, 40), (40, 3)]


def adapted_linear(features, randomize, **lora):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*features))
    randomize(inject(model, LoraConfig(**({"r": 4, "lora_alpha": 12, "target_modules": ["0"]} | lora))))
    return model


# ---- spectrum


@pytest.mark.parametrize("features", SHAPES, ids=str)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("r", [1, 2, 7])
def test_spectrum_is_that_of_the_dense_update(randomize, features, rslora, r):
    adapter = adapted_linear(features, randomize, r=r, lora_alpha=12, use_rslora=rslora)[0]
    values = spectrum(adapter)
    wanted = torch.linalg.svdvals(adapter.delta_weight().double())[:r].float()
    assert values.dtype == torch.float32 and not values.requires_grad
    torch.testing.assert_close(values[: len(wanted)], wanted, rtol=1e-4, atol=1e-5)
    assert (values[len(wanted) :].abs() < 1e-4).all()  # a rank above the layer's width adds nothing
    assert values.tolist() == sorted(values.tolist(), reverse=True)


def test_spectrum_forms_no_dense_update(randomize, monkeypatch):
    adapter = adapted_linear((12, 20), randomize)[0]
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: seen.append(matrix.shape) or matrix.diagonal())
    seen = []
    spectrum(adapter)
    assert seen == [(4, 4)]


def test_spectrum_of_a_fresh_adapter_is_zero():
    model = inject(nn.Sequential(nn.Linear(12, 20)), LoraConfig(r=4, target_modules=["0"]))
    assert spectrum(model[0]).tolist() == [0.0] * 4


class Scaled(Adapter):
    """A variant that is no LoRA: the update is a multiple of a fixed matrix."""

    def __init__(self, base_layer, config, path=""):
        super().__init__(base_layer, config, path)
        self.by = nn.Parameter(torch.tensor(0.5))

    def delta_weight(self):
        return self.by * torch.eye(self.out_features, self.in_features)

    def forward(self, x):
        return self.base_layer(x) + nn.functional.linear(x, self.delta_weight())


class Doubled(LoRALinear):
    """A variant of LoRA whose update is not the product of its factors alone."""

    def delta_weight(self):
        return 2 * super().delta_weight()


@pytest.mark.parametrize("variant", [Scaled, Doubled])
def test_spectrum_of_a_variant_goes_through_its_own_update(randomize, variant):
    torch.manual_seed(0)
    adapter = randomize(variant(nn.Linear(12, 20), LoraConfig(r=4, lora_alpha=12)))
    wanted = torch.linalg.svdvals(adapter.delta_weight().detach())
    torch.testing.assert_close(spectrum(adapter), wanted, rtol=1e-4, atol=1e-5)
    assert wanted[0] > 0.1


# ---- ratios


@pytest.mark.parametrize("quant", [None, QuantConfig("nf4", 32), QuantConfig("nf4", 64, double_quant=True)], ids=str)
def test_update_ratios_against_dense_weights(make_mlp, randomize, quant):
    model = make_mlp(0)
    if quant:
        quantize_model(model, quant)
    dense = {path: dense_weight(model.get_submodule(path)).double() for path in ("first", "mid", "last")}
    inject(model, LoraConfig(r=3, lora_alpha=9, target_modules=["first", "mid", "last"]))
    randomize(model)
    ratios = update_ratios(model)
    assert list(ratios) == ["first", "mid", "last"]
    for path, weight in dense.items():
        layer = model.get_submodule(path)
        assert tuple(weight.shape) == (layer.out_features, layer.in_features)
        update = 3.0 * (layer.lora_B.double() @ layer.lora_A.double()).detach()
        wanted = math.sqrt(update.square().sum()) / math.sqrt(weight.square().sum())
        assert ratios[path] == pytest.approx(wanted, rel=1e-5)
        assert isinstance(ratios[path], float) and ratios[path] > 0


def test_ratios_are_zero_before_training_and_finite_over_a_zero_weight(randomize):
    model = inject(nn.Sequential(nn.Linear(4, 6)), LoraConfig(r=2, target_modules=["0"]))
    assert update_ratios(model) == {"0": 0.0}
    nn.init.zeros_(model[0].innermost.weight)
    randomize(model)
    assert math.isfinite(update_ratios(model)["0"])


def test_one_adapter_of_several_is_looked_at(make_mlp, randomize):
    model = inject(make_mlp(0), LoraConfig(r=3, target_modules=["first"]))
    randomize(model, 1)
    first = update_ratios(model)
    inject(model, LoraConfig(r=2, target_modules=["first", "last"]), "second")
    set_adapter(model, "second")
    randomize(model, 2)
    second = update_ratios(model, "second")
    assert list(second) == ["first", "last"]
    assert second["first"] != first["first"]
    set_adapter(model, ["default", "second"])
    assert update_ratios(model) == first  # whatever is active, and against the layer under all adapters
    assert update_ratios(model, "second") == second


@pytest.mark.parametrize("look", [adapters_in, update_ratios])
def test_what_is_not_there_is_an_error(make_mlp, look):
    with pytest.raises(StateError):
        look(make_mlp(0))
    model = inject(make_mlp(0), LoraConfig(r=3, target_modules=["first"]))
    with pytest.raises(StateError, match="keeper"):
        look(model, "keeper")


def test_adapters_in_leaves_out_what_is_no_adapter(make_mlp):
    config = LoraConfig(r=3, target_modules=["first"], modules_to_save=["last"], bias="all")
    model = inject(make_mlp(0), config)
    assert list(adapters_in(model)) == ["first"]
    assert adapters_in(model)["first"] is model.first


# ---- tables


def by_name(rows):
    assert len({row["name"] for row in rows}) == len(rows)
    return {row["name"]: row for row in rows}


EMBEDDINGS, DENSE, PACKED = "embeddings (and a head tied to them)", "linear layers", "linear layers (nf4)"


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_table_counts_every_parameter_once(make_llama, tied):
    plain = make_llama(0, vocab_size=100, tie_word_embeddings=tied)
    count, head = sum(p.numel() for p in plain.parameters()), 100 * 64
    linear = 2 * 64 * (64 + 32 + 32 + 64 + 3 * 96)  # two layers: q, k, v, o, and three of the MLP
    model = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear"))
    rows = by_name(parameter_table(model))
    assert rows[EMBEDDINGS]["total"] == head
    assert rows[DENSE]["total"] == linear + (0 if tied else head)
    assert rows["norms and biases"]["total"] == 5 * 64
    assert sum(row["total"] for row in rows.values()) == count + rows["adapter"]["total"]
    assert {name: row["trainable"] for name, row in rows.items() if row["trainable"]} == {
        "adapter": rows["adapter"]["total"]
    }
    trainable, every = model.get_nb_trainable_parameters()
    assert sum(row["trainable"] for row in rows.values()) == trainable
    assert sum(row["total"] for row in rows.values()) == every
    assert all(row["bits"] == 32 for row in rows.values())


@pytest.mark.parametrize(
    ("double", "bits"),
    [(False, 4.5), (True, 4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**20)],
)
def test_bits_of_packed_layers(double, bits):
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    quantize_model(model, QuantConfig("nf4", 64, double_quant=double), ["0"])
    (row,) = parameter_table(model)
    assert row == {"name": PACKED, "total": 2**20, "trainable": 0, "bits": pytest.approx(bits, abs=1e-9)}
    if double:
        assert round(row["bits"], 3) == 4.127


def test_packed_layers_count_as_the_weights_they_stand_for(make_llama):
    dense = parameter_table(inject(make_llama(0), LoraConfig(r=4, target_modules="all-linear")))
    model = quantize_model(make_llama(0), QuantConfig("nf4", double_quant=True))
    inject(model, LoraConfig(r=4, target_modules="all-linear"))
    packed = by_name(parameter_table(model))
    assert sum(row["total"] for row in packed.values()) == sum(row["total"] for row in dense)
    assert packed[DENSE]["total"] == 64 * 64  # the head
    assert packed[PACKED]["total"] == by_name(dense)[DENSE]["total"] - 64 * 64
    assert 4.1 < packed[PACKED]["bits"] < 4.4
    assert packed["adapter"]["bits"] == 32


def test_the_bias_of_a_packed_layer_is_a_bias(make_mlp):
    model = quantize_model(make_mlp(0), QuantConfig("nf4", 32))
    rows = by_name(parameter_table(model))
    assert rows["norms and biases"]["total"] == 20 + 14 + 5 + 2 * 20
    assert rows[PACKED]["total"] == 12 * 20 + 20 * 14 + 14 * 5


def test_bits_are_those_of_the_dtype(make_llama):
    model = inject(make_llama(0).to(torch.bfloat16), LoraConfig(r=4, target_modules="all-linear"))
    bits = {name: row["bits"] for name, row in by_name(parameter_table(model)).items()}
    assert bits == {EMBEDDINGS: 16, DENSE: 16, "norms and biases": 16, "adapter": 32}


def test_the_weights_of_conv1d_are_linear_layers(make_gpt2):
    rows = by_name(parameter_table(make_gpt2(0)))
    assert rows[DENSE]["total"] == 2 * 16 * (48 + 16 + 64 + 64)


@pytest.mark.parametrize("quant", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_memory_table_is_bytes(make_llama, quant, tied):
    model = make_llama(0, tie_word_embeddings=tied)
    plain = sum(p.numel() for p in model.parameters()) * 4
    if quant:
        quantize_model(model, QuantConfig("nf4", double_quant=True))
    inject(model, LoraConfig(r=4, target_modules="all-linear"))
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = by_name(memory_table(model))
    assert {name: row["bytes"] for name, row in rows.items() if name != "frozen weights"} == {
        "adapter": trained,
        "gradients": trained,
        "optimizer": 2 * trained,
    }
    table = sum(row["total"] * row["bits"] / 8 for row in parameter_table(model) if row["name"] != "adapter")
    assert rows["frozen weights"]["bytes"] == round(table)
    assert (rows["frozen weights"]["bytes"] < 0.5 * plain) if quant else (rows["frozen weights"]["bytes"] == plain)
    assert all(isinstance(row["bytes"], int) and row["note"] for row in rows.values())


def test_memory_of_optimizer_and_gradients_is_what_adamw_holds(make_llama, ids):
    model = inject(make_llama(0), LoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(ids).logits.sum().backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    rows = by_name(memory_table(model))
    assert rows["optimizer"]["bytes"] == sum(t.nbytes for t in moments)
    assert rows["gradients"]["bytes"] == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)

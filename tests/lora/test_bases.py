"""Layers that are more than their weight: carried, or refused by name before anything has changed. Hooks stay at their place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import minilora
from minilora import LoraConfig, QuantConfig, QuantLinear
from minilora.errors import MiniLoraError, StateError, TargetError
from minilora.lora.bases import is_more_than_its_weight
from minilora.lora.match import linear_paths
from minilora.lora.slots import adapters_of

IN, OUT = 32, 8


def config(*targets, **fields):
    return LoraConfig(r=4, lora_alpha=12, target_modules=list(targets), **fields)


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner, self.head = layer, nn.Linear(OUT, 3)

    def forward(self, x):
        return self.head(self.inner(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Router(nn.Linear):
    """As Llama 4's: a tuple."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.sigmoid(), logits


class Fused(nn.Linear):
    """As Falcon's: the product, written another way."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Positions(nn.Embedding):
    """As BART's: two rows before the first position."""

    def forward(self, ids):
        return super().forward(torch.arange(ids.shape[-1]) + 2)


def patched():
    layer = nn.Linear(IN, OUT)
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) * 2
    return layer


def weight_normed():
    return torch.nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT))


def pruned():
    return prune.random_unstructured(nn.Linear(IN, OUT), "weight", amount=3)


def zero_packed():
    class Zero(QuantLinear):
        def forward(self, x):
            return super().forward(x) * 0

    layer = QuantLinear.from_linear(nn.Linear(IN, OUT), QuantConfig())
    layer.__class__ = Zero
    return layer


MORE = {
    "doubled": (lambda: Doubled(IN, OUT), "Doubled computes something else"),
    "patched": (patched, "Linear computes something else"),
    "packed": (zero_packed, "Zero computes something else"),
    "weight norm": (weight_normed, "its weight is computed.*remove_parametrizations"),
    "pruned": (pruned, "its weight is computed"),
    "max_norm": (lambda: nn.Embedding(9, OUT, max_norm=1.0), "max_norm=1 rewrites the table"),
    "positions": (lambda: Positions(9, OUT), "Positions computes something else than an embedding's rows"),
}


@pytest.mark.parametrize("kind", MORE)
@pytest.mark.parametrize("call", [minilora.inject, minilora.get_peft_model])
def test_what_is_more_than_its_weight_is_refused(kind, call, snapshot):
    make, words = MORE[kind]
    model = Net(make())
    before = snapshot(model)
    with pytest.raises(TargetError, match=rf"^inner: .*{words}" if not words[0].isupper() else f"^inner: {words}"):
        call(model, config("inner"))
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", ["doubled", "router", "patched", "weight norm"])
def test_it_is_not_packed_either(kind, snapshot):
    make, words = MORE.get(kind, (lambda: Router(IN, OUT), "Router has no packed form"))
    model = Net(make())
    before = snapshot(model)
    with pytest.raises(TargetError, match=words):
        minilora.quantize_model(model, target_modules=["inner"])
    assert snapshot(model) == before


def test_a_router_that_is_named_gets_the_update_into_its_weight(randomize):
    router = Router(IN, OUT)
    model = nn.ModuleDict({"inner": router})
    randomize(minilora.inject(model, config("inner")))
    x, adapter = torch.randn(3, IN), model["inner"]
    logits = torch.nn.functional.linear(x, router.weight + adapter.delta_weight(), router.bias)
    for got, want in zip(adapter(x), (logits.sigmoid(), logits), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_all_linear_leaves_out_layers_that_do_more():
    assert linear_paths(Net(Router(IN, OUT))) == ["head"] and linear_paths(Net(Fused(IN, OUT))) == ["inner", "head"]


def test_trying_a_layer_leaves_no_trace():
    layer = Fused(IN, OUT).train()
    state = torch.get_rng_state()
    assert not is_more_than_its_weight(layer) and layer.training and torch.equal(torch.get_rng_state(), state)


def test_a_subclass_that_is_a_product_keeps_its_class_when_merged(randomize):
    model = Net(Fused(IN, OUT)).eval()
    randomize(minilora.inject(model, config("inner")))
    x = torch.randn(3, IN)
    before = model(x)
    minilora.merge(model)
    assert type(model.inner) is Fused
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_a_forward_of_the_object_is_not_lost_in_a_merge(randomize, snapshot):
    layer, calls = nn.Linear(IN, OUT), []
    layer.forward = lambda x: (calls.append(1), F.linear(x, layer.weight, layer.bias))[1]
    model = randomize(minilora.inject(Net(layer), config("inner")))
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"inner: this object's forward was replaced.*del layer\.forward"):
        minilora.merge(model)
    assert snapshot(model) == before
    with pytest.raises(TargetError, match="this object's forward was replaced"):
        minilora.quantize_model(Net(layer), target_modules=["inner"])


def test_the_padding_row_does_not_train():
    model = nn.Sequential(nn.Embedding(9, OUT, padding_idx=3), nn.Linear(OUT, 3))
    minilora.inject(model, config("0"))
    model(torch.arange(9)).sum().backward()
    gradient = model[0].lora_embedding_A.grad
    assert not gradient[:, 3].any() and gradient[:, [0, 1, 2, 4, 5, 6, 7, 8]].abs().amax(0).min() > 0


def test_an_offloaded_base_is_refused(snapshot):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(Net(nn.Linear(IN, OUT)), torch.device("cpu"))
    with pytest.raises(TargetError, match=r"inner: its weight is offloaded.*without offloading"):
        minilora.inject(model, config("inner"))


# ---- hooks


def doubling(_, inputs, output):
    return output * 2


def test_hooks_stay_at_their_place(randomize):
    """Whatever stands there: the bare layer, an adapter, two, a merged layer, the plain model after all."""
    model, seen = Net(nn.Linear(IN, OUT)).eval(), []
    handle = model.inner.register_forward_hook(lambda _, inputs, output: seen.append(output.detach().clone()))
    x = torch.randn(3, IN)

    def now():
        model.head(model.inner(x))
        return seen.pop()

    bare = now()
    minilora.inject(model, config("inner"), "a")
    minilora.inject(model, config("inner"), "b", activate=False)
    minilora.set_adapter(model, ["a", "b"])
    randomize(model)
    adapted = now()
    assert not seen and (adapted - bare).abs().max() > 0.1
    minilora.merge(model)
    torch.testing.assert_close(now(), adapted, rtol=1e-4, atol=1e-4)
    minilora.unmerge(model)
    minilora.set_adapter(model, "a")
    one = now()
    with minilora.batch_adapters(model, ["a", "__base__", "b"]):
        rows = now()
    assert not seen
    torch.testing.assert_close(rows[:2], torch.stack([one[0], bare[1]]), rtol=1e-4, atol=1e-4)
    minilora.unload(model)
    assert torch.equal(now(), bare)
    handle.remove()
    model(x)
    assert not seen


def test_a_hook_that_changes_the_output_does_so_before_and_after_a_merge(randomize):
    model, x = Net(nn.Linear(IN, OUT)).eval(), torch.randn(3, IN)
    model.inner.register_forward_hook(doubling)
    base = copy.deepcopy(model)(x)
    randomize(minilora.inject(model, config("inner")))
    before = model(x)
    assert (before - base).abs().max() > 0.1
    minilora.merge(model)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    minilora.unload(model, keep_merged=True)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)


def test_a_hook_on_the_adapter_is_not_lost_in_a_merge(randomize):
    model, seen = randomize(minilora.inject(Net(nn.Linear(IN, OUT)), config("inner"))), []
    model.inner.register_forward_hook(lambda *_: seen.append(1))
    model.inner.register_full_backward_hook(lambda *_: seen.append(2))
    minilora.merge(model)
    minilora.unload(model, keep_merged=True)
    model(torch.randn(3, IN, requires_grad=True)).sum().backward()
    assert seen == [1, 2]


def test_packing_and_unpacking_carry_hooks(randomize):
    model, seen = Net(nn.Linear(IN, OUT)), []
    model.inner.register_forward_hook(lambda *_: seen.append(1))
    minilora.quantize_model(model, target_modules=["inner"])
    model(torch.randn(3, IN))
    randomize(minilora.inject(model, config("inner")))
    minilora.merge(model)
    model(torch.randn(3, IN))
    assert seen == [1, 1] and type(model.inner) is nn.Linear


# ---- dropout


@pytest.mark.parametrize(
    "dropout",
    [nn.AlphaDropout(0.5), nn.Sequential(nn.Dropout(0.5)), type("Mine", (nn.Dropout,), {})(0.5), nn.Dropout(1.0)],
)
def test_a_replaced_dropout_is_called(dropout):
    model = minilora.inject(Net(nn.Linear(IN, OUT)), config("inner", init_lora_weights=False, lora_dropout=0.1))
    model.inner.lora_dropout = dropout
    model.train()
    x = torch.randn(3, IN)
    torch.manual_seed(4)
    got = model.inner(x)
    torch.manual_seed(4)
    base = model.inner.base_layer(x)
    assert torch.equal(got, base + model.inner.update(dropout(x)))


# ---- weights and records that are shared


def test_two_layers_over_one_weight_are_not_merged_into_it(snapshot):
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    model["b"].weight = model["a"].weight
    minilora.inject(model, config("a", "b", init_lora_weights=False))
    before = snapshot(model)
    with pytest.raises(StateError, match=r"b shares its weight with a and their updates differ.*untie"):
        minilora.merge(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "call",
    [
        minilora.quantize_model,
        lambda model: minilora.inject(model, LoraConfig(r=2, target_modules="all-linear")),
        lambda model: minilora.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False),
    ],
    ids=["quantize", "inject", "prepare"],
)
def test_a_part_that_carries_adapters_is_left_alone(call, make_mlp, snapshot):
    outer = nn.ModuleDict({"inner": minilora.inject(make_mlp(), config("first"))})
    before = snapshot(outer)
    with pytest.raises(MiniLoraError, match=r"inner\.first carries an adapter already"):
        call(outer)
    assert snapshot(outer) == before


def test_a_part_of_a_model_with_adapters_is_left_alone(make_mlp, snapshot):
    outer = minilora.inject(nn.ModuleDict({"inner": make_mlp()}), LoraConfig(r=2, target_modules=["first"]))
    before = snapshot(outer)
    with pytest.raises(StateError, match="first carries an adapter already, which belongs to another model"):
        minilora.quantize_model(outer["inner"])
    assert snapshot(outer) == before and list(adapters_of(outer).slots) == ["inner.first"]


# ---- DoRA where a row has no direction


def test_dora_on_a_row_of_zeros_and_on_one_that_cancels():
    layer = nn.Linear(IN, OUT)
    with torch.no_grad():
        layer.weight[2] = 0
    base, x = copy.deepcopy(layer), torch.randn(5, IN)
    model = minilora.inject(Net(layer), config("inner", use_dora=True)).eval()
    adapter = model.inner
    torch.testing.assert_close(adapter(x), base(x))
    adapter(x).square().sum().backward()
    assert adapter.lora_B.grad[2].abs().max() > 0 and torch.isfinite(adapter.lora_magnitude_vector.grad).all()
    with torch.no_grad():
        adapter.lora_A[0], adapter.lora_B[3] = base.weight[3], torch.tensor([-1 / adapter.scaling, 0, 0, 0])
    torch.testing.assert_close(adapter(x)[:, 3], base(x)[:, 3])
    torch.testing.assert_close(
        adapter(x), F.linear(x, base.weight + adapter.delta_weight(), base.bias), rtol=1e-4, atol=1e-5
    )
    assert torch.isfinite(adapter.delta_weight()).all()


class Calls(nn.Linear):
    """Its product is doubled where it is called, and not in its forward."""

    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


class Scales(nn.Linear):
    """The model multiplies by what the layer holds beside its weight."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = nn.Parameter(torch.full((1,), 3.0))


class Counts(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("seen", torch.zeros(1))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Calls, "Calls computes something else"),
        (Scales, "Scales holds 'scale' beside"),
        (Counts, "Counts holds 'seen' beside"),
    ],
)
def test_what_a_layer_has_more_is_refused_by_name(layer, words):
    for change in (
        lambda model: minilora.inject(model, config("inner")),
        lambda model: minilora.quantize_model(model, target_modules=["inner"]),
    ):
        model = Net(layer(IN, OUT)).eval()
        x = torch.randn(3, IN)
        before, kept = model(x), model.inner
        with pytest.raises(minilora.MiniLoraError, match=words):
            change(model)
        assert model.inner is kept and torch.equal(model(x), before)


def test_the_word_for_no_adapter_names_none(make_mlp):
    with pytest.raises(minilora.MiniLoraError, match="'__base__': in a batch it means no adapter"):
        minilora.inject(make_mlp(), minilora.LoraConfig(r=2, lora_alpha=6, target_modules=["mid"]), "__base__")


class Multiplies(nn.Module):
    """A model that reads a number from its layer, and does without where there is none."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(IN, OUT)
        self.inner.factor = 3.0

    def forward(self, x):
        return self.inner(x) * getattr(self.inner, "factor", 1.0)


def test_what_was_set_on_a_layer_is_found_on_what_takes_its_place(randomize):
    torch.manual_seed(0)
    model, x = Multiplies().eval(), torch.randn(3, IN)
    before = model(x)
    minilora.inject(model, config("inner"))
    assert torch.equal(model(x), before)
    randomize(model)
    wanted = model(x)
    minilora.merge(model)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    plain = Multiplies().eval()
    minilora.quantize_model(plain)
    packed = plain.inner(x)
    torch.testing.assert_close(plain(x), 3 * packed)
    minilora.merge(randomize(minilora.inject(plain, config("inner"))))
    assert plain.inner.factor == 3.0 and not minilora.linear.layers.is_quantized(plain.inner)


def test_an_embedding_with_its_factor_in_a_buffer_is_adapted(randomize):
    """Gemma 3's: ``embed_scale`` is a buffer, and part of what the rows are multiplied with."""
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    torch.manual_seed(0)
    table, ids = gemma.Gemma3TextScaledWordEmbedding(9, OUT, padding_idx=0, embed_scale=2.5), torch.tensor([[1, 4, 8]])
    model = Net(table).eval()
    before = model.inner(ids)
    minilora.inject(model, config("inner"))
    assert torch.equal(model.inner(ids), before)
    randomize(model)
    wanted = before + 2.5 * model.inner.delta_weight()[ids]
    torch.testing.assert_close(model.inner(ids), wanted, rtol=1e-4, atol=1e-4)

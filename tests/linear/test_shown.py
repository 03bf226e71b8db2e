"""What ``layer.weight`` answers: the dtype and shape at once, the effective weight where it is computed with, never a silent write."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora
from minilora import LoraConfig, QuantConfig, QuantLinear
from minilora.errors import QuantizationError, StateError
from minilora.linear.layers import dense_weight
from minilora.linear.shown import ShownWeight

IN, OUT = 33, 20
transformers = pytest.importorskip("transformers")


def packed(format="nf4", double=False, dtype=torch.float32, conv1d=False):
    torch.manual_seed(0)
    layer = transformers.pytorch_utils.Conv1D(OUT, IN) if conv1d else nn.Linear(IN, OUT)
    return QuantLinear.from_linear(layer.to(dtype), QuantConfig(format, double_quant=double))


def x_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_answers_as_the_dense_one_would(dtype, conv1d):
    layer = packed(dtype=dtype, conv1d=conv1d)
    weight = layer.weight
    assert isinstance(weight, ShownWeight) and isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, weight.requires_grad) == (dtype, torch.device("cpu"), False)
    assert weight.shape == ((IN, OUT) if conv1d else (OUT, IN)) and weight.dim() == 2 and len(weight) == weight.size(0)
    dense = dense_weight(layer).t() if conv1d else dense_weight(layer)
    assert torch.equal(weight.clone(), dense) and torch.equal(weight[3], dense[3])
    assert torch.equal(weight.t(), dense.t()) and torch.equal(torch.cat([weight, weight.data]), torch.cat([dense] * 2))


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_its_dtype_follows_a_cast_of_the_model(cast):
    layer = packed().to(cast)
    assert layer.weight.dtype == layer.dtype == layer.bias.dtype == cast
    assert layer.codes.dtype == torch.uint8


def adapted(packs=False, **fields):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layer": nn.Linear(IN, OUT)})
    if packs:
        minilora.quantize_model(model)
    config = LoraConfig(r=3, lora_alpha=12, target_modules=["layer"], init_lora_weights=False, **fields)
    return minilora.inject(model, config).eval()


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "lora_bias"])
def test_a_parent_that_reads_the_weight_gets_what_a_call_gives(packs, fields):
    layer, x = adapted(packs, **fields)["layer"], x_of(5)
    read = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(read, layer(x), rtol=1e-5, atol=1e-5)
    assert (read - layer.base_layer(x)).abs().max() > 0.1
    ours = torch.autograd.grad(read.square().sum(), [layer.lora_A, layer.lora_B])
    called = torch.autograd.grad(layer(x).square().sum(), [layer.lora_A, layer.lora_B])
    for one, other in zip(ours, called, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_dropout_cannot_reach_a_weight_that_is_read():
    model = adapted(lora_dropout=0.5)
    assert model["layer"].weight.sum().isfinite()
    with pytest.raises(StateError, match=r"33 to 20.*lora_dropout=0, or exclude"):
        model.train()["layer"].weight.sum()


@pytest.mark.parametrize("make", [packed, lambda: adapted()["layer"]], ids=["packed", "adapted"])
@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(2),
        lambda w: w.data.zero_(),
        lambda w: w.detach().fill_(1),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: torch.add(w, 1, out=w),
        lambda w: nn.init.normal_(w),
        lambda w: w.requires_grad_(True),
        lambda w: w.data_ptr(),
    ],
)
def test_a_write_that_would_be_lost_is_refused(make, write):
    layer = make()
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(StateError, match="layer"), torch.no_grad():
        write(layer.weight)
    assert all(torch.equal(value, kept[name]) for name, value in layer.state_dict().items())


def test_a_write_that_changes_nothing_is_none():
    weight = adapted()["layer"].weight
    with torch.no_grad():
        assert weight.mul_(1) is weight  # RWKV multiplies by a power of two that may be 1


def test_parameters_are_found_by_their_names():
    layer = packed(double=True)
    for name, parameter in layer.named_parameters():
        assert isinstance(layer.get_parameter(name), nn.Parameter)
        assert parameter.dtype == (torch.float32 if name == "bias" else torch.uint8)


def test_marks_on_the_parameter_are_seen():
    """transformers notes on a parameter that it is initialized, and looks before it draws another."""
    layer = packed()
    assert not hasattr(layer.weight, "_is_hf_initialized")
    layer.codes._is_hf_initialized = True
    assert layer.weight._is_hf_initialized


def test_codes_that_something_wrote_over_are_refused():
    layer = packed()
    layer._parameters["weight"] = nn.Parameter(torch.zeros(OUT, IN), requires_grad=False)
    with pytest.raises(QuantizationError, match=r"holds torch.float32 where its uint8 codes were"):
        layer(x_of(2))


def test_integers_are_no_input():
    with pytest.raises(QuantizationError, match=r"x is torch.uint8.*layer\.weight\.dtype"):
        packed()(torch.ones(2, IN, dtype=torch.uint8))


# ---- state dicts


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"format": "fp4"}, "format=nf4 and this layer fp4"),
        ({"format": "nf4", "double": True}, "double_quant=False and this layer True"),
    ],
)
def test_a_state_of_another_format_is_refused(other, words):
    source, target = packed(), packed(**other)
    kept = copy.deepcopy(target.state_dict())
    with pytest.raises(QuantizationError, match=words):
        target.load_state_dict(source.state_dict(), strict=False)
    assert all(torch.equal(value, kept[name]) for name, value in target.state_dict().items())


def test_a_state_that_names_its_layer():
    model, other = nn.Sequential(packed()), nn.Sequential(packed("fp4"))
    with pytest.raises(QuantizationError, match=r"^0: the state has format=nf4"):
        other.load_state_dict(model.state_dict())


def test_a_state_that_names_no_format_loads_where_its_user_says_so():
    source, target = packed(), packed()
    target.codes.zero_()
    old = {name: value for name, value in source.state_dict().items() if name != "_extra_state"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "_extra_state"'):
        target.load_state_dict(old, strict=True)
    result = target.load_state_dict(old, strict=False)
    assert result.missing_keys == ["_extra_state"] and torch.equal(target(x_of(2)), source(x_of(2)))


def test_a_state_is_tensors_only():
    assert all(isinstance(value, torch.Tensor) for value in packed().state_dict().values())
    twin = pickle.loads(pickle.dumps(packed()))
    assert torch.equal(twin(x_of(2)), packed()(x_of(2)))


# ---- derivatives


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_and_forward_mode_see_the_product():
    layer = packed(double=True)
    W, x, t = dense_weight(layer), x_of(3), x_of(1, 3)[0] + 1
    out, tangent = torch.func.jvp(layer, (x,), (t,))
    torch.testing.assert_close(tangent, F.linear(t, W))
    torch.testing.assert_close(out, layer(x))
    torch.testing.assert_close(torch.vmap(layer)(x), layer(x))
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), W)
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, t))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, F.linear(t, W))


# ---- whole models


IDS = torch.tensor([[5, 9, 2, 7, 1, 3, 8]])


def dense_twin(model, dense):
    """``dense`` with the very weights that ``model`` decodes."""
    with torch.no_grad():
        for path, layer in model.named_modules():
            if isinstance(layer, QuantLinear):
                dense.get_submodule(path).weight.copy_(dense_weight(layer))
    return dense


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                                   feed_forward_proj="gated-gelu", decoder_start_token_id=0)  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_casts_by_the_dtype_of_a_packed_layer(dtype):
    model = t5()
    dense = dense_twin(minilora.quantize_model(model), t5())
    logits = [each.to(dtype)(input_ids=IDS, decoder_input_ids=IDS).logits for each in (model, dense)]
    assert logits[0].dtype == logits[1].dtype == dtype
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_t5_compiles_with_packed_layers():
    model = minilora.quantize_model(t5())
    wanted = model(input_ids=IDS, decoder_input_ids=IDS).logits
    got = torch.compile(model, backend="aot_eager")(input_ids=IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def mamba():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config).eval()


def test_mamba_multiplies_with_a_packed_weight_itself():
    model = minilora.quantize_model(mamba(), target_modules=["dt_proj", "in_proj"])
    torch.testing.assert_close(model(IDS).logits, dense_twin(model, mamba())(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "mamba"])
def test_adapters_of_layers_that_are_read_are_alive_and_merge(kind, randomize):
    torch.manual_seed(0)
    if kind == "encoder":  # in eval its layers are read by a fused kernel, unless a weight is none
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2).eval()
        targets, run = ["linear1", "linear2"], lambda: model(x_of(2)[:, :16].view(1, 2, 16))
    else:
        model = mamba()
        targets, run = ["dt_proj"], lambda: model(IDS).logits
    with torch.no_grad():
        base = run()
        minilora.inject(model, LoraConfig(r=3, lora_alpha=12, target_modules=targets))
        torch.testing.assert_close(run(), base, rtol=1e-4, atol=1e-5)
        randomize(model)
        changed = run()
        assert (changed - base).abs().max() > 1e-5
        minilora.merge(model)
        torch.testing.assert_close(run(), changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("double", [False, True])
def test_a_cast_packed_model_merges_to_one_dtype(double):
    model = nn.Sequential(nn.Linear(IN, OUT))
    minilora.quantize_model(model, QuantConfig(double_quant=double)).to(torch.bfloat16)
    minilora.inject(model, LoraConfig(r=3, lora_alpha=12, target_modules=["0"], init_lora_weights=False))
    x = x_of(4, dtype=torch.bfloat16)
    before = model(x)
    minilora.merge(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(x), before, rtol=5e-2, atol=0.2)

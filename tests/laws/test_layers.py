"""The law of adapters on layers that are not linear: convolutions, embeddings and torch's attention, for every variant that stands there.

The oracle knows no adapter: it takes patches, rows or torch's own function with ``dense_weight + delta_weight``.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora
from minilora import LoraConfig
from minilora.errors import StateError
from minilora.linear.layers import dense_weight, kind_of
from minilora.lora.adapter import variants_on
from minilora.lora.slot import own_parameters
from minilora.lora.slots import adapters_of
from minilora.lora.starts import CordaConfig, LoraGAConfig
from minilora.many.adapted import disabled

LAYERS = {
    "conv1d": lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1),
    "conv1d_reflect": lambda: nn.Conv1d(6, 8, 4, padding="same", padding_mode="reflect", dilation=2, bias=False),
    "conv2d": lambda: nn.Conv2d(6, 8, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    "conv2d_groups": lambda: nn.Conv2d(6, 8, 3, groups=2, padding=1, padding_mode="circular"),
    "conv3d": lambda: nn.Conv3d(4, 6, 2, padding=1, padding_mode="replicate"),
    "embedding": lambda: nn.Embedding(11, 7, padding_idx=2),
    "attention": lambda: nn.MultiheadAttention(12, 3, batch_first=True),
    "attention_plain": lambda: nn.MultiheadAttention(12, 2, bias=False, add_zero_attn=True),
}
FIELDS = {
    "convolution": {
        "lora": {},
        "rslora": {"use_rslora": True},
        "bias": {"lora_bias": True},
        "dora": {"use_dora": True},
        "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    },
    "embedding": {
        "lora": {},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"},
        "orthogonal": {"init_lora_weights": "orthogonal"},
        "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig()},
        "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
        "mica": {"init_lora_weights": "mica"},
    },
    "attention": {"lora": {}, "rslora": {"use_rslora": True}},
}  # fmt: skip
F32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {F32: 2e-5, BF16: 4e-2}  # of the largest output


def kind(name):
    return kind_of(LAYERS[name]())


CASES = [(name, fields) for name in LAYERS for fields in FIELDS[kind(name)]]
every_case = pytest.mark.parametrize(("name", "fields"), CASES)
every_dtype = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def make(name, dtype=F32):
    torch.manual_seed(5)
    layer = LAYERS[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                parameter.normal_()
    return layer.to(dtype).requires_grad_(False).eval()


def config(name, fields, **more):
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["layer"]} | FIELDS[kind(name)][fields] | more
    return LoraConfig(**settings)


def adapted(name, fields, dtype=F32, seed=0, **more):
    """A model of one layer with an adapter, whose values are random."""
    model = nn.ModuleDict({"layer": make(name, dtype)}).eval()
    minilora.inject(model, config(name, fields, **more))
    return scatter(model, "default", seed)


def scatter(model, adapter_name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in adapters_of(model).named(adapter_name).values():
            for parameter in own_parameters(value):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def inputs(name, dtype=F32, batch=3):
    generator = torch.Generator().manual_seed(9)
    if name == "embedding":
        return torch.tensor([[0, 2, 10], [3, 3, 7], [9, 1, 2]])[:batch]
    if kind(name) == "attention":
        return torch.randn(batch, 5, 12, generator=generator).to(dtype)
    layer = LAYERS[name]()
    return torch.randn(batch, layer.in_channels, *[7] * len(layer.kernel_size), generator=generator).to(dtype)


def call(model, x):
    layer = model["layer"] if isinstance(model, nn.ModuleDict) else model
    return layer(x, x, x, need_weights=False)[0] if hasattr(layer, "in_proj_weight") else layer(x)


def wanted(model, name, x, adapter_name="default"):
    """What the layer must compute, from the base and ``delta_weight``."""
    values = adapters_of(model).named(adapter_name)
    adapter = values["layer"]
    base, x = adapter.innermost, x if name == "embedding" else x.double()
    weight = dense_weight(base).double() + adapter.delta_weight().double()
    if name == "embedding":
        return weight[x]
    if kind(name) == "attention":
        out = values["layer.out_proj"]
        output = out.innermost.weight.double() + out.delta_weight().double()
        biases = [None if base.in_proj_bias is None else base.in_proj_bias.double(), out.innermost.bias]
        x = x.transpose(0, 1) if base.batch_first else x
        got = F.multi_head_attention_forward(
            x, x, x, 12, base.num_heads, weight, biases[0], None, None, base.add_zero_attn, 0.0, output,
            None if biases[1] is None else biases[1].double(), training=False, need_weights=False,
        )[0]  # fmt: skip
        return got.transpose(0, 1) if base.batch_first else got
    shape = (weight.shape[1], base.in_channels, *base.kernel_size)
    settings = {name: getattr(base, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    patches = type(base)(base.in_channels, shape[0], base.kernel_size, bias=False, **settings).double()
    with torch.no_grad():
        patches.weight.copy_(torch.eye(shape[0]).view(shape))
    y = torch.einsum("op,np...->no...", weight, patches(x))
    shift = [bias for bias in (base.bias, adapter.delta_bias()) if bias is not None]
    return y + sum(bias.double() for bias in shift).view(-1, *[1] * (y.dim() - 2)) if shift else y


def distance(got, want):
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def bytes_of(module):
    return {name: t.contiguous().reshape(-1).view(torch.uint8).clone() for name, t in module.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", FIELDS)
def test_every_registered_variant_is_a_case(kind):
    assert {LoraConfig(**fields).variant for fields in FIELDS[kind].values()} == set(variants_on(kind))


@every_case
@every_dtype
def test_identity_at_initialisation(name, fields, dtype):
    layer, x = make(name, dtype), inputs(name, dtype)
    want = call(copy.deepcopy(layer), x)
    model = minilora.inject(nn.ModuleDict({"layer": layer}).eval(), config(name, fields))
    got = call(model, x)
    # Torch computes an attention in another way where nothing trains; then a rounding may differ.
    assert got.dtype == dtype and (torch.equal(got, want) or (kind(name) == "attention" and distance(got, want) < 1e-6))


@every_case
@every_dtype
def test_forward_is_dense_weight_plus_delta(name, fields, dtype):
    model, x = adapted(name, fields, dtype), inputs(name, dtype)
    adapter = model["layer"]
    assert adapter.delta_weight().norm() > 0.3 * dense_weight(adapter.innermost).float().norm(), "too small to notice"
    got = call(model, x)
    assert got.dtype == dtype and distance(got, wanted(model, name, x)) < TOLERANCE[dtype]


@every_case
def test_gradients_are_those_of_the_dense_update(name, fields):
    model, x = adapted(name, fields), inputs(name)
    trained = [p for value in adapters_of(model).named("default").values() for p in own_parameters(value)]
    y = call(model, x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    got = torch.autograd.grad((y * cotangent).sum(), trained)
    want = torch.autograd.grad((wanted(model, name, x) * cotangent).sum(), trained)
    for mine, theirs in zip(got, want, strict=True):
        if name == "embedding" and mine.shape == (4, 11):  # the padding row trains nothing, as its base
            assert not mine[:, 2].any()
            mine, theirs = mine[:, [0, 1, *range(3, 11)]], theirs[:, [0, 1, *range(3, 11)]]
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
        assert mine.abs().max() > 1e-2


@every_case
@every_dtype
def test_merging_keeps_the_output_and_unmerging_every_bit(name, fields, dtype):
    model, x = adapted(name, fields, dtype), inputs(name, dtype)
    kept, before = bytes_of(model), call(model, x)
    for _ in range(3):
        report = minilora.merge(model)
        assert type(model["layer"]) is type(LAYERS[name]()) and not any(p.requires_grad for p in model.parameters())
        assert distance(call(model, x), before) < TOLERANCE[dtype] and report.survived > 0.9
        minilora.unmerge(model)
        assert same(bytes_of(model), kept) and torch.equal(call(model, x), before)


@every_case
def test_unloading_merged_leaves_a_plain_model(name, fields):
    model, x = adapted(name, fields), inputs(name)
    before = call(model, x)
    minilora.merge(model)
    minilora.unload(model, keep_merged=True)
    assert not [m for m in model.modules() if isinstance(m, minilora.Adapter)]
    names = [n for n, _ in nn.ModuleDict({"layer": make(name)}).named_parameters()]
    more = (
        ["layer.bias"] if fields == "bias" and "layer.bias" not in names else []
    )  # the update's, where there was none
    assert [n for n, _ in model.named_parameters()] == [*names, *more]
    assert distance(call(model, x), before) < TOLERANCE[F32]


@every_case
def test_disabled_and_switched_adapters(name, fields):
    model, x = adapted(name, fields), inputs(name)
    base, first = call(make(name), x), call(model, x)
    minilora.inject(model, config(name, fields, r=2), "b")
    scatter(model, "b", 7)
    second = call(model, x)
    assert distance(second, wanted(model, name, x, "b")) < TOLERANCE[F32] and distance(second, first) > 0.05
    with disabled(model):
        assert torch.equal(call(model, x), base)
    minilora.set_adapter(model, "default")
    assert torch.equal(call(model, x), first)


@pytest.mark.parametrize("name", LAYERS)
def test_stacked_adapters_add_up_and_merge(name):
    model, x = adapted(name, "lora"), inputs(name)
    minilora.inject(model, config(name, "rslora", r=2), "b")
    scatter(model, "b", 7)
    one, two = (adapters_of(model).named(each)["layer"].delta_weight() for each in ("default", "b"))
    minilora.set_adapter(model, ["default", "b"])
    both = call(model, x)
    minilora.merge(model)
    change = dense_weight(model["layer"]) - dense_weight(make(name))
    torch.testing.assert_close(change, one + two, rtol=1e-4, atol=1e-5)
    assert distance(call(model, x), both) < TOLERANCE[F32]


@every_case
def test_saving_and_loading(name, fields, tmp_path):
    model, x = adapted(name, fields), inputs(name)
    minilora.save_adapter(model, tmp_path)
    again = nn.ModuleDict({"layer": make(name)}).eval()
    minilora.load_adapter(again, tmp_path)
    assert distance(call(again, x), call(model, x)) < 1e-6
    assert same(bytes_of(again), bytes_of(model))


@every_case
def test_training_moves_the_adapter_and_nothing_else(name, fields):
    model, x = nn.ModuleDict({"layer": make(name)}), inputs(name)
    kept = bytes_of(model)
    minilora.inject(model.train(), config(name, fields, **({} if kind(name) == "attention" else {"lora_dropout": 0.2})))
    torch.manual_seed(0)
    goal = torch.randn(call(model, x).shape)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.mse_loss(call(model, x), goal)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with disabled(model):
        assert same(bytes_of(model), kept)


@pytest.mark.parametrize("name", [name for name in LAYERS if kind(name) == "convolution"])
def test_rows_of_a_batch_with_an_adapter_each(name):
    model, x = adapted(name, "lora"), inputs(name)
    minilora.inject(model, config(name, "rslora", r=2), "b")
    scatter(model, "b", 7)
    singles = {"__base__": call(make(name), x)}
    for each in ("default", "b"):
        minilora.set_adapter(model, each)
        singles[each] = call(model, x)
    names = ["b", "__base__", "default"]
    with minilora.batch_adapters(model, names):
        got = call(model, x)
    for row, each in enumerate(names):
        assert distance(got[row], singles[each][row]) < TOLERANCE[F32]
    assert distance(got[0], singles["default"][0]) > 0.05


@pytest.mark.parametrize("name", ["attention", "attention_plain"])
def test_an_attention_is_the_same_for_every_row(name):
    model, x = adapted(name, "lora"), inputs(name)
    with pytest.raises(StateError, match="MultiheadAttention"), minilora.batch_adapters(model, ["default"] * 3):
        pass
    base = call(make(name), x)
    with minilora.batch_adapters(model, ["__base__"] * 3):
        assert distance(call(model, x), base) < 1e-6


def encoder():
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_fast_path_of_an_encoder_meets_the_adapter(grad, masked):
    """In eval mode ``nn.TransformerEncoderLayer`` reads the weights of its parts and calls none of them."""
    x, mask = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = masked
    model = minilora.inject(encoder(), LoraConfig(r=4, lora_alpha=6, target_modules=["self_attn", "linear2"]))
    scatter(model, "default")
    dense = encoder()
    weights = dict(dense.named_parameters())
    for path, adapter in adapters_of(model).named("default").items():
        held = weights[f"{path}.in_proj_weight" if path.endswith("self_attn") else f"{path}.weight"]
        with torch.no_grad():
            held.add_(adapter.delta_weight())
    with torch.set_grad_enabled(grad):
        got, want = (each(x, src_key_padding_mask=mask if masked else None) for each in (model, dense.train()))
    assert distance(got[~mask], want[~mask]) < TOLERANCE[F32]
    assert distance(got[~mask], encoder()(x)[~mask]) > 0.05


def test_a_saved_attention_loads_through_a_regex(tmp_path):
    """The config names the attention; the file has a second adapter in it, which belongs to the first."""
    model = minilora.inject(encoder(), LoraConfig(r=4, lora_alpha=6, target_modules=r".*\.0\.self_attn"))
    minilora.save_adapter(scatter(model, "default"), tmp_path)
    again = encoder()
    minilora.load_adapter(again, tmp_path)
    x = torch.randn(3, 5, 12)
    assert distance(again(x), model(x)) < 1e-6


def test_all_linear_leaves_convolutions_and_attentions_out():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "attention": nn.MultiheadAttention(6, 2), "fc": nn.Linear(4, 5)})
    minilora.inject(model, LoraConfig(target_modules="all-linear"))
    assert list(adapters_of(model).slots) == ["fc"]


def test_a_model_reads_what_it_knows_of_its_layers():
    conv, attention = adapted("conv2d", "dora")["layer"], adapted("attention", "lora")["layer"]
    assert (conv.stride, conv.kernel_size, conv.in_channels) == ((1, 2), (3, 2), 6)
    assert (attention.embed_dim, attention.num_heads, attention.batch_first) == (12, 3, True)
    want = dense_weight(conv.innermost) + conv.delta_weight()
    assert conv.weight.shape == (8, 6, 3, 2)
    torch.testing.assert_close(conv.weight + 0, want.view(8, 6, 3, 2))
    grouped = adapted("conv2d_groups", "lora")["layer"]
    assert grouped.weight.shape == (8, 3, 3, 3)
    with pytest.raises(StateError, match="2 groups"):
        grouped.weight + 0
    with pytest.raises(AttributeError):
        _ = conv.nothing


def test_hot_swap_and_sums_of_convolutions(tmp_path):
    model, x = adapted("conv2d", "lora"), inputs("conv2d")
    minilora.inject(model, config("conv2d", "rslora", r=2), "b")
    scatter(model, "b", 7)
    deltas = [adapters_of(model).named(each)["layer"].delta_weight() for each in ("default", "b")]
    for how, tolerance in (("cat", 1e-5), ("svd", 1e-4)):
        minilora.add_weighted_adapter(
            model, ["default", "b"], [0.5, -2.0], how, how, svd_rank=6 if how == "svd" else None
        )
        got = adapters_of(model).named(how)["layer"].delta_weight()
        assert distance(got, 0.5 * deltas[0] - 2 * deltas[1]) < tolerance
    other = adapted("conv2d", "lora", seed=3, r=2)
    minilora.save_adapter(other, tmp_path)
    minilora.hotswap_adapter(model, tmp_path, "default")
    minilora.set_adapter(model, "default")
    assert distance(call(model, x), call(other, x)) < TOLERANCE[F32]


def test_a_convolution_with_a_forward_of_its_own_is_refused():
    class Causal(nn.Conv1d):
        def forward(self, x):
            return super().forward(F.pad(x, (2, 0)))

    class Plain(nn.Conv1d):
        def forward(self, x):
            return super().forward(x)

    minilora.inject(nn.ModuleDict({"layer": Plain(3, 4, 3)}), LoraConfig(target_modules=["layer"]))
    with pytest.raises(minilora.MiniLoraError, match="Causal computes something else than a convolution"):
        minilora.inject(nn.ModuleDict({"layer": Causal(3, 4, 3)}), LoraConfig(target_modules=["layer"]))

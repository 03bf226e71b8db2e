"""Adapters on a model whose linear layers are GGUF's blocks of several types: trained, merged, saved, looked at, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora
from minilora.errors import QuantizationError, StateError, TargetError
from minilora.hf.packed import packed_state_dict
from minilora.job.sessions import packing_of
from minilora.linear.gguf import GGUFLinear
from minilora.linear.layers import dense_weight, with_weight
from minilora.measure.plan import predict
from minilora.report.inspect import parameter_table
from minilora.store.fingerprint import differs, fingerprint
from tests.compare import same, snapshot
from tests.gguf_blocks import gguf_weight

OUT = {"up": 96, "gate": 96, "down": 256}
KINDS = {"up": "Q4_K", "gate": "Q6_K", "down": "Q5_1"}


class Block(nn.Module):
    """``down(up(x) * silu(gate(x)))``, 256 wide."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        for seed, (name, rows) in enumerate(OUT.items()):
            columns = 96 if name == "down" else 256
            bias = nn.Parameter(torch.linspace(-1, 1, rows, dtype=dtype), requires_grad=False)
            setattr(self, name, GGUFLinear(gguf_weight(KINDS[name], rows, columns, seed, dtype), bias))

    def forward(self, x):
        return self.down(self.up(x) * F.silu(self.gate(x)))


def config(**fields):
    return minilora.LoraConfig(r=4, lora_alpha=10, target_modules=["up", "gate", "down"], **fields)


def adapted(seed=0, dtype=torch.float32, **fields):
    torch.manual_seed(seed)
    model = Block(dtype)
    minilora.inject(model, config(**fields))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def x_of(dtype=torch.float32):
    return torch.randn(5, 256, generator=torch.Generator().manual_seed(3)).to(dtype)


def dense_twin(model):
    """A copy whose layers hold the decoded weights."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, GGUFLinear):
            owner, _, own = name.rpartition(".")
            setattr(twin.get_submodule(owner), own, with_weight(module, dense_weight(module)))
    return twin


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "fields", [{}, {"use_dora": True}, {"use_rslora": True, "bias": "lora_only"}, {"lora_bias": True}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients_are_the_dense_models(fields, dtype):
    model = adapted(dtype=dtype, **fields)
    twin, x = dense_twin(model), x_of(dtype)
    outs = [each(x) for each in (model, twin)]
    assert (outs[0] - model(0 * x)).abs().max() > 0.1
    grads = [torch.autograd.grad(out.float().square().sum(), [*trained(each).values()])
             for out, each in zip(outs, (model, twin), strict=True)]  # fmt: skip
    most = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert (ours - theirs).abs().max() <= most * theirs.abs().max()


def test_training_moves_the_adapter_and_no_byte_of_the_base():
    model = adapted(lora_dropout=0.2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = (model(x_of()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained(model).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_makes_dense_layers_and_unmerging_gives_back_every_bit(dtype):
    model, x = adapted(dtype=dtype), x_of(dtype)
    bytes_before, out = {name: value.clone() for name, value in model.state_dict().items()}, model(x)
    report = minilora.merge(model)
    assert type(model.up) is nn.Linear and model.up.weight.dtype == dtype
    assert report.survived > 0.98 and report.into == str(dtype).removeprefix("torch.")
    assert (model(x) - out).abs().max() <= (1e-5 if dtype == torch.float32 else 5e-2) * out.abs().max()
    minilora.unmerge(model)
    assert same(model.state_dict(), bytes_before) and torch.equal(model(x), out)
    minilora.merge(model)
    plain = minilora.unload(model, keep_merged=True)
    assert {type(plain.get_submodule(name)) for name in OUT} == {nn.Linear}


def test_merging_back_into_blocks_is_refused_before_anything_changes():
    model = adapted()
    before = snapshot(model)
    with pytest.raises(
        QuantizationError, match=r"up: is packed as Q4_K, a format of GGUF that is read here and not written"
    ):
        minilora.merge(model, requantize=True)
    assert snapshot(model) == before


def test_an_adapter_is_saved_and_loaded_onto_the_same_blocks(tmp_path):
    model, x = adapted(), x_of()
    minilora.save_adapter(model, tmp_path)
    fresh = Block().eval()
    minilora.load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))


def test_a_state_of_the_whole_model_comes_back():
    model, other = adapted(), adapted(seed=1)
    for name in OUT:
        getattr(other, name).base_layer.codes.data.bitwise_xor_(1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(x_of()), model(x_of()))


def test_the_fingerprint_is_of_the_decoded_weights():
    model, dense = Block(), dense_twin(Block())
    remembered = fingerprint(model, OUT)
    assert {said[0] for said in remembered["samples"].values()} == {"packed"}
    assert (
        differs(remembered, fingerprint(Block(), OUT)) is None and differs(remembered, fingerprint(dense, OUT)) is None
    )
    for name in OUT:
        getattr(model, name).codes.data.random_(0, 0x3B)
    assert differs(remembered, fingerprint(model, OUT)) is not None


def test_the_table_of_parameters_has_formats_and_exact_bits():
    rows = {row["name"]: row for row in parameter_table(adapted())}
    assert rows["linear layers (Q4_K)"]["bits"] == 4.5 and rows["linear layers (Q4_K)"]["total"] == 96 * 256
    assert rows["linear layers (Q6_K)"]["bits"] == 6.5625 and rows["linear layers (Q5_1)"]["bits"] == 6
    assert rows["norms and biases"]["total"] == sum(OUT.values())


def test_a_run_remembers_the_formats():
    packing = packing_of(Block(), by_folder=True)
    assert packing.quant == "Q4_K-Q5_1-Q6_K" and packing.blocksize == 256 and not packing.double_quant
    assert packing.levels != packing_of(nn.Sequential(Block().up)).levels


def test_a_plan_counts_the_files_bytes():
    model = adapted()
    held = sum(
        each.quantized().nbytes + 4 * each.out_features for each in model.modules() if isinstance(each, GGUFLinear)
    )
    assert predict(model, lambda paper: paper(x_of()).square().mean()).parts["weights"] == held


def test_what_packs_dense_weights_refuses_them():
    model = Block()
    before = snapshot(model)
    with pytest.raises(TargetError, match="up is quantized already; leave it out"):
        minilora.quantize_model(model, target_modules=["up"])
    with pytest.raises(TargetError, match="no dense linear layer is left"):
        minilora.quantize_model(model)
    with pytest.raises(
        StateError,
        match=r"up: is packed as Q4_K, a format of GGUF, and its folder is its own \.gguf file; save the adapter",
    ):
        packed_state_dict(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("start", ["pissa", "olora", "orthogonal"])
def test_starts_from_the_weight_read_what_is_decoded(start):
    model, twin, x = Block().eval(), dense_twin(Block().eval()), x_of()
    want = model(x)
    for each in (model, twin):
        torch.manual_seed(1)
        minilora.inject(each, config(init_lora_weights=start))
        torch.testing.assert_close(each(x), want, rtol=1e-4, atol=1e-4)
    for (name, ours), theirs in zip(trained(model).items(), trained(twin).values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_a_start_that_packs_itself_is_refused():
    model = Block()
    before = snapshot(model)
    with pytest.raises(minilora.MiniLoraError, match="up: is packed already, and LoftQ packs its base layer itself"):
        minilora.inject(model, config(init_lora_weights="loftq"))
    assert snapshot(model) == before

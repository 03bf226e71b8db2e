"""LoRA-XS against its formula in double precision, what its file holds, and what it refuses. The laws are in ``tests/laws``."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn

import minilora
from minilora import inject, load_adapter, save_adapter
from minilora.errors import CheckpointError, ConfigError, TargetError
from minilora.linear.layers import dense_weight
from minilora.lora.adapter import VARIANTS
from minilora.lora.slots import adapters_of
from minilora.lora.variants import lora_xs
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from tests.compare import close
from tests.lora.test_variants import IN, OUT, R, S, config, every_base, every_dtype, inputs, make, make_base


def made(base="linear", **fields):
    model, adapter = make(base, "lora_xs", **fields)
    with torch.no_grad():
        adapter.lora_xs_R.normal_(generator=torch.Generator().manual_seed(4))
    return model, adapter


@every_base
@every_dtype
@pytest.mark.parametrize("rslora", [False, True])
def test_the_update_is_r_between_singular_vectors(base, dtype, rslora):
    _, adapter = made(base, dtype=dtype, use_rslora=rslora)
    W = dense_weight(adapter.innermost).double()
    U, sizes, Vh = torch.linalg.svd(W, full_matrices=False)
    signs = torch.sign((Vh[:R] * adapter.lora_xs_A.double()).sum(1))  # which are the library's choice
    left, right = U[:, :R] * signs, signs[:, None] * Vh[:R]
    assert (adapter.lora_xs_A.shape, adapter.lora_xs_B.shape) == ((R, IN), (OUT, R))
    want = S * (R**0.5 if rslora else 1) * (left * sizes[:R]) @ adapter.lora_xs_R.double() @ right
    close(adapter.delta_weight(), want, 1e-4)
    x = inputs(dtype=dtype)
    bias = adapter.innermost.bias.double()
    got = adapter(x)
    assert got.dtype == dtype
    close(got, x.double() @ (W + want).T + bias, 3e-2 if dtype == torch.bfloat16 else 1e-5)


@every_base
def test_it_starts_at_zero_and_r_gets_the_projected_gradient(base):
    """At zero the gradient of R is whole: both factors beside it are there."""
    _, adapter = make(base, "lora_xs")
    x, cotangent = inputs(7), torch.randn(7, OUT, generator=torch.Generator().manual_seed(2))
    assert torch.equal(adapter(x), adapter.base_layer(x)) and not adapter.lora_xs_R.any()
    (adapter(x) * cotangent).sum().backward()
    G = cotangent.double().T @ x.double()
    close(adapter.lora_xs_R.grad, S * adapter.lora_xs_B.double().T @ G @ adapter.lora_xs_A.double().T)


def test_r_alone_trains():
    model, _ = make("linear", "lora_xs")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad} == {"layer.lora_xs_R": (R, R)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model["layer"](inputs()).square().sum().backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"layer.lora_xs_R"}


@every_base
def test_a_file_holds_the_vectors_that_its_r_belongs_to(base, tmp_path, monkeypatch):
    """Another library may give a singular vector the other sign, and R would mean another update beside it."""
    model, _ = made(base)
    save_adapter(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    sizes = {key.removeprefix("base_model.model.layer."): tuple(tensor.shape) for key, tensor in tensors.items()}
    assert sizes == {"lora_xs_A": (R, IN), "lora_xs_B": (OUT, R), "lora_xs_R": (R, R)}
    real = lora_xs.principal_directions

    def another_sign(*args):
        A, B = real(*args)
        signs = torch.tensor([1.0, -1.0] * (R // 2))
        return signs[:, None] * A, B * signs

    monkeypatch.setattr(lora_xs, "principal_directions", another_sign)
    again = nn.ModuleDict({"layer": make_base(base)}).eval()
    load_adapter(again, tmp_path, "other")
    assert adapters_of(again).variants == {"other": "lora_xs"} and type(again["layer"]) is VARIANTS["lora_xs"]
    assert torch.equal(again["layer"](inputs()), model["layer"](inputs()))


def test_a_file_without_its_vectors_is_refused(tmp_path):
    model, _ = made()
    save_adapter(model, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    with safetensors.safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        metadata = file.metadata()
    tensors.pop("base_model.model.layer.lora_xs_A")
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS_FILE, metadata)
    (tmp_path / SEAL_FILE).unlink()
    with pytest.raises(CheckpointError, match="lora_xs_A"):
        load_adapter(nn.ModuleDict({"layer": make_base()}), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft_reads_the_export(dtype, make_llama, randomize, ids, tmp_path):
    peft = pytest.importorskip("peft")
    fields = {"r": 5, "lora_alpha": 7, "rank_pattern": {"down_proj": 3}, "use_rslora": True}
    model = inject(make_llama().to(dtype), config(["q_proj", "down_proj"], **fields), variant="lora_xs")
    randomize(model)
    minilora.export_adapter(model, tmp_path, "vllm")
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(make_llama().to(dtype), tmp_path).eval()
    plain = make_llama().to(dtype)(ids).logits
    got, want = theirs(ids).logits, model(ids).logits
    assert (want - plain).abs().max() > 1e-2
    close(got, want, 5e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": OUT + 1}, rf"r={OUT + 1} for a weight of \({OUT}, {IN}\); set rank_pattern=\{{'layer': {OUT}\}}"),
        ({"init_lora_weights": False}, "init_lora_weights=False is for another variant"),
        ({"init_lora_weights": "pissa"}, "variant='lora_xs', and init_lora_weights='pissa' means 'pissa'"),
        ({"lora_bias": True}, "lora_bias=True is for another variant"),
        ({"use_dora": True}, "variant='lora_xs', and use_dora=True means 'dora'"),
        ({"alora_invocation_tokens": [3]}, "variant='lora_xs', and alora_invocation_tokens means 'alora'"),
    ],
    ids=str,
)
def test_what_it_does_not_do_is_refused(fields, words):
    base = nn.ModuleDict({"layer": make_base()})
    before = base.state_dict()
    with pytest.raises(ConfigError, match=words):
        inject(base, config(**fields), variant="lora_xs")
    assert base.state_dict().keys() == before.keys()


def test_it_stands_on_linear_layers_only():
    with pytest.raises(TargetError, match=r"which takes .* not lora_xs"):
        inject(nn.ModuleDict({"layer": nn.Conv1d(4, 6, 3)}), config(r=2), variant="lora_xs")

"""Adapters that make up for what packing lost, on a base that is packed already."""

import json

import pytest
import torch
from torch import nn

from minilora.errors import CheckpointError, KindError, StateError
from minilora.peft import LoraConfig, get_peft_model, replace_lora_weights_loftq
from minilora.qlora.quantize_model import quantize_model
from minilora.quant.config import QuantConfig
from tests.models import finished, plain_bitsandbytes, randomize

save_file = pytest.importorskip("safetensors.torch").save_file
X = torch.randn(16, 96, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(96, 64), nn.Linear(64, 40, bias=False)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def dense():
    torch.manual_seed(0)
    return finished(Net())


def by_bitsandbytes(model):
    pytest.importorskip("bitsandbytes")
    bnb = plain_bitsandbytes()
    for name in ("a", "b"):
        old = getattr(model, name)
        new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=old.bias is not None, quant_type="nf4")
        new.load_state_dict(old.state_dict())
        setattr(model, name, new.to("cpu"))
    return model


def by_minilora(model):
    return quantize_model(model, QuantConfig("nf4"))


def adapted(pack, **fields):
    return get_peft_model(
        pack(dense()), LoraConfig(**{"r": 8, "lora_alpha": 20, "target_modules": ["a", "b"]} | fields)
    )


@torch.no_grad()
def error(model):
    return float((model(X) - dense()(X)).norm())


@pytest.fixture
def folder(tmp_path):
    save_file(dense().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("pack", [by_bitsandbytes, by_minilora])
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"b": 3}}], ids=str)
def test_the_update_is_the_best_of_its_rank(pack, fields, folder):
    from minilora.linear.layers import dense_weight
    from minilora.lora.slots import adapters_of

    model = adapted(pack, **fields)
    before = error(model)
    replace_lora_weights_loftq(model, folder)
    assert error(model) < 0.95 * before
    for path, layer in adapters_of(model).named("default").items():
        lost = dense().get_submodule(path).weight.detach() - dense_weight(layer.innermost).float()
        U, S, Vh = torch.linalg.svd(lost, full_matrices=False)
        best = (U[:, : layer.r] * S[: layer.r]) @ Vh[: layer.r]
        torch.testing.assert_close(layer.delta_weight().detach(), best, rtol=0, atol=1e-6)


def test_peft_leaves_the_scaling_out(folder):
    """The correction that it writes is ``scaling`` times too large or small; on a CPU it does not run, so its formula is written here."""
    model = adapted(by_minilora)
    replace_lora_weights_loftq(model, folder)
    right = error(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_((20 / 8) ** 0.5)  # sqrt(S) instead of sqrt(S / scaling)
    assert error(model) > 1.1 * right


def test_a_callback_keeps_or_takes_back(folder):
    model = randomize(adapted(by_minilora))
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen = []

    def only_b(adapted_model, path):
        seen.append((adapted_model is model, path))
        return path == "b"

    replace_lora_weights_loftq(model, folder / "model.safetensors", callback=only_b)
    assert seen == [(True, "a"), (True, "b")]
    changed = {name.split(".")[2] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"b"}

    def fails(*_):
        raise RuntimeError("no logits")

    now = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="no logits"):
        replace_lora_weights_loftq(model, folder, callback=fails)
    assert all(torch.equal(p, now[name]) for name, p in model.named_parameters())


def test_several_files_and_names_with_the_models_prefix(tmp_path):
    state = {f"model.{name}": tensor for name, tensor in dense().state_dict().items()}
    for at, name in enumerate(("a", "b")):
        save_file({k: v for k, v in state.items() if f".{name}." in k}, tmp_path / f"part-{at}.safetensors")
    names = {k: f"part-{'ab'.index(k.split('.')[1])}.safetensors" for k in state}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    model = adapted(by_minilora)
    before = error(model)
    replace_lora_weights_loftq(model, tmp_path)
    assert error(model) < 0.95 * before


def no_file(folder):
    (folder / "model.safetensors").unlink()


def other_weights(folder):
    save_file({k: torch.randn_like(v) for k, v in dense().state_dict().items()}, folder / "model.safetensors")


def other_shapes(folder):
    save_file({k: v[..., :4].clone() for k, v in dense().state_dict().items()}, folder / "model.safetensors")


def fewer(folder):
    save_file({"a.weight": dense().a.weight.detach()}, folder / "model.safetensors")


def no_safetensors(folder):
    (folder / "model.safetensors").write_bytes(b"nothing")


def no_index(folder):
    (folder / "model.safetensors.index.json").write_text("[]")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_file, "cannot be read as safetensors"),
        (other_weights, r"a\.weight is another weight"),
        (other_shapes, r"a\.weight is \[64, 4\], the packed layer \[64, 96\]"),
        (fewer, r"has no b\.weight"),
        (no_safetensors, "cannot be read as safetensors"),
        (no_index, "no index of safetensors"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(damage, words, folder):
    damage(folder)
    model = adapted(by_minilora)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=words):
        replace_lora_weights_loftq(model, folder)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_where_there_is_nothing_to_do(folder):
    with pytest.raises(KindError, match="No bnb LoRA module found"):
        replace_lora_weights_loftq(adapted(lambda model: model), folder)
    with pytest.raises(StateError, match="give model_path"):
        replace_lora_weights_loftq(adapted(by_minilora))


def test_the_folder_that_the_model_names(folder):
    model = adapted(by_minilora)
    model.name_or_path = str(folder)
    before = error(model)
    replace_lora_weights_loftq(model)
    assert error(model) < 0.95 * before

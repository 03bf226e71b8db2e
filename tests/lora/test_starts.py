"""Start values that are made from data: CorDA and LoRA-GA against PEFT and their formulas, what they leave and refuse."""

import dataclasses
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora
from minilora import LoraConfig, inject
from minilora.errors import CheckpointError, ConfigError, KindError, StateError, TargetError
from minilora.linear.layers import dense_weight
from minilora.lora.starts import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from minilora.lora.variants.corda import CordaLinear, preprocess_corda
from minilora.lora.variants.lora_ga import LoraGALinear, preprocess_loraga
from minilora.many.adapted import disabled
from minilora.store.load import adapter_state_dict
from tests.compare import close, same, snapshot
from tests.models import Conv1D, finished, lora

SEED = 3


class Net(nn.Module):
    """12 -> 20 -> 14 -> 9."""

    def __init__(self):
        super().__init__()
        self.first, self.mid, self.last = nn.Linear(12, 20), Conv1D(14, 20), nn.Linear(14, 9)

    def forward(self, x):
        return self.last(torch.tanh(self.mid(torch.tanh(self.first(x)))))


def net():
    torch.manual_seed(0)
    return finished(Net())


def data(rows=64):
    return torch.rand(rows, 12, generator=torch.Generator().manual_seed(1)) + 0.1


def step(model):
    """Two batches of regression."""

    def run():
        for x in data().chunk(2):
            F.mse_loss(model(x), torch.ones(len(x), 9)).backward()

    return run


def config(kind, **fields):
    own = {"corda": {"corda_config": CordaConfig()}, "lora_ga": {"lora_ga_config": LoraGAConfig()}}[kind]
    return lora(("first", "last"), init_lora_weights=kind, **{**own, **fields})


def prepare(kind, model, settings):
    if kind == "corda":
        preprocess_corda(model, settings, lambda: [model(x) for x in data().chunk(2)])
    else:
        torch.manual_seed(SEED)
        preprocess_loraga(model, settings, step(model))
    return model


def theirs(kind, settings, **own):
    """PEFT's model with the same settings, and ours."""
    peft = pytest.importorskip("peft")
    with pytest.MonkeyPatch.context() as patch:
        if "attr" not in sys.modules and importlib.util.find_spec("attr") is None:
            patch.setitem(sys.modules, "attr", dataclasses)  # of which PEFT wants ``dataclass`` only
        from peft.tuners.lora.corda import preprocess_corda as corda
    from peft.tuners.lora.config import CordaConfig as CordaTheirs
    from peft.tuners.lora.config import LoraGAConfig as LoraGATheirs
    from peft.tuners.lora.loraga import preprocess_loraga as loraga

    model = net()
    sub = CordaTheirs(**own) if kind == "corda" else LoraGATheirs(**own)
    words = {"r": 3, "lora_alpha": 12, "target_modules": ["first", "last"], "init_lora_weights": kind}
    there = peft.LoraConfig(**words, **{f"{kind}_config": sub}, **settings)
    if kind == "corda":
        corda(model, there, lambda: [model(x) for x in data().chunk(2)])
    else:
        torch.manual_seed(SEED)
        loraga(model, there, step(model))
    torch.manual_seed(SEED)
    return peft.get_peft_model(model, there)


def ours(kind, settings, **own):
    model = net()
    made = {"corda": CordaConfig, "lora_ga": LoraGAConfig}[kind](**own)
    there = config(kind, **{f"{kind}_config": made}, **settings)
    prepare(kind, model, there)
    torch.manual_seed(SEED)
    return inject(model, there)


VARIOUS = {
    "ipm": ("corda", {}, {"corda_method": "ipm"}),
    "kpm": ("corda", {}, {"corda_method": "kpm"}),
    "ranks": ("corda", {"rank_pattern": {"last": 2}, "alpha_pattern": {"first": 5}}, {}),
    **{
        f"{direction} {scale}": ("lora_ga", {}, {"direction": direction, "scale": scale, "stable_gamma": 9})
        for direction in ("ArBr", "A2rBr", "ArB2r", "random")
        for scale in ("stable", "weight_svd", "gd_scale", "unit")
    },
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(("kind", "settings", "own"), VARIOUS.values(), ids=VARIOUS)
def test_start_and_output_are_those_of_peft(kind, settings, own):
    peft = pytest.importorskip("peft")
    mine, other = ours(kind, settings, **own), theirs(kind, settings, **own)
    got, want = adapter_state_dict(mine), peft.get_peft_model_state_dict(other)
    assert {key for key in got if "lora_start" not in key} == set(want)
    for key in want:
        close(got[key], want[key], 1e-4)
    with torch.no_grad():
        for key, value in got.items():
            if "start" not in key:
                value.mul_(1.5)
        peft.set_peft_model_state_dict(other, {key: value for key, value in got.items() if "start" not in key})
        close(mine(data()), other(data()), 1e-4)


@pytest.mark.parametrize("kind", ["corda", "lora_ga"])
def test_the_layer_begins_unchanged_and_the_base_stays(kind):
    want = net()(data())
    model = ours(kind, {"use_rslora": True})
    assert isinstance(model.first, CordaLinear if kind == "corda" else LoraGALinear) and model.first.lora_B.any()
    close(model(data()), want)
    with disabled(model):
        assert torch.equal(model(data()), want)
    assert not hasattr(model.first.base_layer, model.first.data_name), "taken away when it was used"


@pytest.mark.parametrize("kind", ["corda", "lora_ga"])
def test_a_saved_one_is_the_same_without_the_data(kind, tmp_path):
    model = ours(kind, {})
    with torch.no_grad():
        model.first.lora_B.mul_(3)
    minilora.save_adapter(model, tmp_path)
    again = net()
    minilora.load_adapter(again, tmp_path)
    assert same(adapter_state_dict(model), adapter_state_dict(again)) and torch.equal(again(data()), model(data()))
    minilora.export_adapter(model, tmp_path / "plain", "vllm")
    plain = net()
    minilora.load_adapter(plain, tmp_path / "plain")
    close(plain(data()), model(data()))


@pytest.mark.parametrize("kind", ["corda", "lora_ga"])
def test_without_data_it_is_refused_and_nothing_has_changed(kind):
    model = net()
    before = snapshot(model)
    with pytest.raises(
        TargetError, match="please run `preprocess_corda` first" if kind == "corda" else "run preprocess_loraga first"
    ):
        inject(model, config(kind))
    assert snapshot(model) == before


def test_a_failure_leaves_the_data_where_it_is():
    model = prepare("corda", net(), config("corda"))
    with pytest.raises(ConfigError, match="run preprocess_corda with this model and config"):
        inject(model, config("corda", r=2))
    inject(model, config("corda"))


@pytest.mark.parametrize("kind", ["corda", "lora_ga"])
def test_preprocessing_leaves_nothing_but_the_data(kind):
    model = net().train()
    model.first.weight.requires_grad_(False)
    model.last.weight.grad = kept = torch.ones_like(model.last.weight)
    before = snapshot(model)
    prepare(kind, model, config(kind))
    assert snapshot(model) == before and not model.first._forward_hooks
    assert model.last.weight.grad is kept and model.first.weight.grad is None
    assert hasattr(model.first, "eigens" if kind == "corda" else "_peft_loraga_grad") and not hasattr(
        model.mid, "eigens"
    )


def test_corda_orders_the_weight_by_what_the_data_makes_of_it():
    model, weight = net(), dense_weight(net().first).double()
    x = data().double()
    preprocess_corda(
        model, config("corda", corda_config=CordaConfig(prune_temporary_fields=False)), lambda: model(data())
    )
    kept = model.first.covariance_matrix.double()
    close(kept, x.T @ x / x.max() ** 2)
    assert model.first.sample_count == 1
    raised = kept + 0.01 * kept.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(weight @ raised, full_matrices=False)
    found = model.first.eigens
    got = found.U_WC.double() * found.S_WC.double() @ found.V_WC.double().T
    close(got, U[:, :3] * S[:3] @ (Vh[:3] @ torch.linalg.inv(raised)), 1e-4)


def test_corda_reads_its_files_and_refuses_those_of_another_model(tmp_path):
    cache, covariance = tmp_path / "new" / "cache", tmp_path / "new" / "covariance"
    first = prepare("corda", net(), config("corda", corda_config=CordaConfig(cache, covariance)))
    for files in (CordaConfig(cache), CordaConfig(covariance_file=covariance)):
        again = net()
        preprocess_corda(again, config("corda", corda_config=files))
        for name in ("S_WC", "U_WC", "V_WC"):
            assert torch.equal(getattr(again.first.eigens, name), getattr(first.first.eigens, name))
    with pytest.raises(CheckpointError, match=r"has no mid\.eigens\.S_WC"):
        preprocess_corda(net(), lora(("mid",), init_lora_weights="corda", corda_config=CordaConfig(cache)))


def test_corda_takes_the_inputs_of_a_copy_that_runs():
    model, runs = net(), net()
    preprocess_corda(model, config("corda"), lambda: runs(data()), runs)
    assert hasattr(model.first, "eigens") and not hasattr(runs.first, "eigens")


def test_corda_says_what_is_missing():
    with pytest.raises(ConfigError, match="corda_config is None"):
        preprocess_corda(net(), lora(("first",)), lambda: None)
    with pytest.raises(StateError, match="run_model must be specified"):
        preprocess_corda(net(), config("corda"))
    with pytest.raises(StateError, match="first saw no input"):
        preprocess_corda(net(), config("corda"), lambda: None)
    model = net()
    with pytest.raises(StateError, match="NaN or infinity, or zeros only"):
        preprocess_corda(model, config("corda"), lambda: model(torch.zeros(2, 12)))
    assert not model.first._forward_hooks
    with pytest.raises(ConfigError, match="CorDA: r=10 for last"):
        preprocess_corda(model, config("corda", r=10), lambda: model(data()))


def test_lora_ga_counts_every_gradient_and_reads_its_file(tmp_path):
    model, settings = net(), config("lora_ga")
    want = 0
    for x in data().chunk(2):
        want = want + torch.autograd.grad(F.mse_loss(model(x), torch.ones(len(x), 9)), model.first.weight)[0] / 2

    def forgets():
        for x in data().chunk(2):
            model.zero_grad()
            F.mse_loss(model(x), torch.ones(len(x), 9)).backward()

    preprocess_loraga(model, settings, forgets, tmp_path / "new" / "gradients")
    close(model.first._peft_loraga_grad, want)
    again = net()
    preprocess_loraga(again, settings, lambda: pytest.fail("it was read"), tmp_path / "new" / "gradients")
    assert torch.equal(again.first._peft_loraga_grad, model.first._peft_loraga_grad)
    with pytest.raises(CheckpointError, match="has no gradient of mid"):
        preprocess_loraga(
            net(),
            lora(("mid",), init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()),
            None,
            tmp_path / "new" / "gradients",
        )


def test_lora_ga_on_conv1d_is_that_on_linear():
    turned, model = net(), net()
    turned.mid = nn.Linear(20, 14)
    turned.mid.weight.data, turned.mid.bias.data = model.mid.weight.data.T.clone(), model.mid.bias.data.clone()
    settings = lora(("mid",), init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    for each in (turned, model):
        prepare("lora_ga", each, settings)
        torch.manual_seed(SEED)
        inject(each, settings)
    close(model.mid.lora_A, turned.mid.lora_A, 1e-4)
    close(model.mid.lora_B, turned.mid.lora_B, 1e-4)


def test_lora_ga_says_what_is_missing():
    with pytest.raises(ConfigError, match="If you want to use LoRA-GA"):
        preprocess_loraga(net(), lora(("first",)), lambda: None)
    with pytest.raises(StateError, match="first got no gradient"):
        preprocess_loraga(net(), config("lora_ga"), lambda: None)
    packed = minilora.quantize_model(nn.Sequential(nn.Linear(64, 32)))
    with pytest.raises(TargetError, match="0 is quantized"):
        preprocess_loraga(packed, lora(("0",), init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()), None)
    tables = nn.ModuleDict({"table": nn.Embedding(7, 5)})
    with pytest.raises(TargetError, match="No supported layers found"):
        preprocess_loraga(tables, lora(("table",), init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()), None)
    model = prepare("lora_ga", net(), config("lora_ga"))
    with pytest.raises(ConfigError, match="lora_ga_config must be provided"):
        inject(model, lora(("first", "last"), init_lora_weights="lora_ga"))
    with pytest.raises(ConfigError, match=r"2 r directions, and r=5"):
        inject(model, config("lora_ga", r=5))


# ---- settings


def test_settings_go_through_a_file_as_they_are():
    for kind, settings in (
        ("corda", CordaConfig("a/b", corda_method="kpm")),
        ("lora_ga", LoraGAConfig("ArBr", "unit", 4)),
    ):
        content = config(kind, **{f"{kind}_config": settings}).to_dict()
        assert isinstance(content[f"{kind}_config"], dict)
        assert getattr(LoraConfig.from_dict(content), f"{kind}_config") == settings
    assert LoraConfig(init_lora_weights="loftq", loftq_config=LoftQConfig(3, 2)).loftq_config == {
        "loftq_bits": 3,
        "loftq_iter": 2,
    }


def test_settings_say_when_they_do_nothing_and_when_they_are_the_default():
    with pytest.warns(UserWarning, match="Using default EVA config"):
        assert LoraConfig(init_lora_weights="eva").eva_config == EvaConfig()
    with pytest.warns(UserWarning, match="Using default CorDA config"):
        assert LoraConfig(init_lora_weights="corda").corda_config == CordaConfig()
    for name, value in (("eva", EvaConfig()), ("corda", CordaConfig()), ("lora_ga", LoraGAConfig())):
        with pytest.warns(UserWarning, match=f"`{name}_config` specified but will be ignored"):
            LoraConfig(**{f"{name}_config": value})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: EvaConfig(rho=0.5), "`rho` must be >= 1.0"),
        (lambda: EvaConfig(rho=float("nan")), "`rho` must be >= 1.0"),
        (lambda: EvaConfig(tau=1.1), "`tau` must be between 0.0 and 1.0."),
        (lambda: EvaConfig(tau="much"), "wanted a number"),
        (lambda: EvaConfig(whiten=1), "whiten=1"),
        (lambda: CordaConfig(corda_method="both"), "corda_method='both'"),
        (lambda: CordaConfig(verbose=2), "verbose=2"),
        (lambda: LoraGAConfig(direction="up"), "direction='up'"),
        (lambda: LoraGAConfig(scale="big"), "scale='big'"),
        (lambda: LoraGAConfig(stable_gamma=0), "stable_gamma=0"),
        (lambda: LoftQConfig(loftq_bits=5), "loftq_bits=5"),
        (lambda: LoraConfig(init_lora_weights="eva", eva_config={"roh": 2}), "unknown key 'roh'.*'rho'"),
        (lambda: LoraConfig(init_lora_weights="eva", eva_config=3), "wanted a EvaConfig"),
    ],
)
def test_settings_that_cannot_be_meant(make, says):
    with pytest.raises(ConfigError, match=says) as caught:
        make()
    assert isinstance(caught.value, KindError) == says.startswith("wanted a E")

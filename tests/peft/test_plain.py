"""``save_pretrained(path_initial_model_for_weight_conversion=)``: an adapter with a start of its own as a plain LoRA of twice the rank."""

import json
import warnings

import pytest
import torch
from torch import nn

import minilora.lora.slots
from minilora.errors import CheckpointError, ConfigError, StateError
from minilora.lora.variants.corda import preprocess_corda
from minilora.peft import CordaConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model, preprocess_loraga
from tests.compare import close
from tests.models import Conv1D, finished, randomize

X = torch.tensor([[3, 8, 1, 20], [7, 7, 0, 2]])


class Net(nn.Module):
    """A table, layers of both orientations, a convolution of two groups, a head."""

    def __init__(self):
        super().__init__()
        self.table, self.first = nn.Embedding(23, 12), nn.Linear(12, 20)
        self.mid, self.conv, self.head = Conv1D(14, 20), nn.Conv1d(14, 10, 3, padding=1, groups=2), nn.Linear(10, 5)

    def forward(self, ids):
        hidden = torch.tanh(self.mid(torch.tanh(self.first(self.table(ids)))))
        return self.head(torch.tanh(self.conv(hidden.mT).mT))


def net():
    torch.manual_seed(0)
    return finished(Net())


def made(**fields):
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["first", "mid"]} | fields)
    model = net()
    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, lambda: model(X))
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(model, config, lambda: model(X).square().sum().backward())
    return get_peft_model(model, config).eval()


def converted(model, folder):
    """The start saved as PEFT's documentation says, then training, then the conversion. Returns what the trained model computes."""
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "start")
    randomize(model)
    model.save_pretrained(folder / "plain", path_initial_model_for_weight_conversion=folder / "start")
    return model(X)


STARTS = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig()},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
    "rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "patterns": {"init_lora_weights": "olora", "rank_pattern": {"mid": 6}, "alpha_pattern": {"first": 5}},
    "embedding": {"init_lora_weights": "pissa", "target_modules": ["table", "first"]},
    "biases and a copy": {"init_lora_weights": "olora", "bias": "lora_only", "modules_to_save": ["head"]},
    "token rows": {"init_lora_weights": "pissa", "trainable_token_indices": {"table": [3, 20]}},
    "lora_ga beside a convolution": {
        "init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig(), "target_modules": ["first", "conv"],
    },
    "plain": {"target_modules": ["table", "first", "conv"]},
    "not all from zero": {"init_lora_weights": "orthogonal"},
}  # fmt: skip


@pytest.mark.parametrize("fields", STARTS.values(), ids=STARTS)
def test_the_same_numbers_on_the_original_base(fields, tmp_path):
    model = made(**fields)
    own = model.peft_config["default"]
    with warnings.catch_warnings():
        if own.init_lora_weights == "orthogonal":
            warnings.filterwarnings("ignore", "`path_initial_model_for_weight_conversion` only works for")
        wanted = converted(model, tmp_path)
    loaded = PeftModel.from_pretrained(net(), tmp_path / "plain")
    close(loaded(X), wanted, 1e-4)
    config = loaded.peft_config["default"]
    assert (config.r, config.init_lora_weights, config.variant) == (8, True, "lora")
    assert config.scaling("first") == pytest.approx(own.scaling("first"))
    ranks = {path: 2 * own.for_module(path)[0] for path in ("first", "mid")}
    assert {path: config.for_module(path)[0] for path in ranks} == ranks
    with loaded.disable_adapter():
        close(loaded(X), net()(X), 1e-6)


def test_a_saved_start_says_what_it_is(tmp_path):
    """PEFT's recipe sets the config of the model to True, and back. The folder is a PiSSA adapter all the while, and loads as one."""
    model = made(init_lora_weights="pissa")
    config = model.peft_config["default"]
    config.init_lora_weights = True
    model.save_pretrained(tmp_path)
    config.init_lora_weights = "pissa"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == "pissa"
    close(PeftModel.from_pretrained(net(), tmp_path)(X), net()(X), 1e-5)
    for other in ("olora", False):
        with pytest.raises(ConfigError, match=r"init_lora_weights=.*: a model has adapters of this config already"):
            config.init_lora_weights = other


def other_start(folder):
    made(init_lora_weights="pissa_niter_0").save_pretrained(folder / "start")


def trained(folder):
    randomize(made(init_lora_weights="pissa")).save_pretrained(folder / "start")


def other_rank(folder):
    made(init_lora_weights="pissa", r=5).save_pretrained(folder / "start")


def other_layers(folder):
    made(init_lora_weights="pissa", target_modules=["first"]).save_pretrained(folder / "start")


@pytest.mark.parametrize("save", [other_start, trained, other_rank, other_layers])
def test_another_start_is_not_subtracted(save, tmp_path):
    save(tmp_path)
    model = randomize(made(init_lora_weights="pissa"))
    with pytest.raises(CheckpointError, match="in which it was saved before training"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert not (tmp_path / "plain").exists()


def test_a_plain_adapter_that_starts_random_has_no_start_to_subtract(tmp_path):
    """PEFT subtracts it, and the converted adapter computes something else than the one that was trained."""
    model = made(init_lora_weights=False)
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(CheckpointError, match="first begins with another update"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"mid": 6}}, ConfigError, "Passing `path_initial"),
        ({"init_lora_weights": "olora", "use_rslora": True, "alpha_pattern": {"mid": 6}}, ConfigError, "Passing `path_initial"),
        ({"use_dora": True}, StateError, "first: DoRA rescales"),
        ({"lora_bias": True}, StateError, "first: lora_bias"),
        ({"init_lora_weights": "loftq", "target_modules": ["first"]}, StateError, "first: a LoftQLinear is no plain LoRA on the original"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`path_initial_model", "ignore:Using Rank-Stabilized LoRA")
def test_what_is_no_plain_lora(fields, error, words, tmp_path):
    model = made(**fields)
    model.save_pretrained(tmp_path / "start")
    with pytest.raises(error, match=words):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert not (tmp_path / "plain").exists()


def test_what_has_diverged_is_not_written(tmp_path):
    model = made(init_lora_weights="pissa")
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        minilora.lora.slots.adapters_of(model).slots["mid"].kept["default"].lora_B[1, 1] = torch.nan
    with pytest.raises(StateError, match=r"NaN or infinity in .*mid\.lora_B"):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_nothing_is_written_where_one_of_two_cannot_be(tmp_path):
    model = made(init_lora_weights="pissa")
    model.add_adapter("other", LoraConfig(r=4, target_modules=["first"], use_dora=True))
    model.save_pretrained(tmp_path / "start", selected_adapters=["default"])
    with (
        pytest.warns(UserWarning, match="`path_initial_model_for_weight_conversion` only works"),
        pytest.raises(StateError, match="DoRA"),
    ):
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert not (tmp_path / "plain").exists()


def test_rslora_with_patterns_is_told_when_the_config_is_built():
    with pytest.warns(
        UserWarning, match="Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training"
    ):
        LoraConfig(init_lora_weights="olora", use_rslora=True, rank_pattern={"q": 3})
    LoraConfig(init_lora_weights="olora", use_rslora=True)
    LoraConfig(use_rslora=True, rank_pattern={"q": 3})

"""EVA: the directions and ranks that PEFT finds, what the model is afterwards, and what is refused."""

import pytest
import torch
from torch import nn

from minilora import LoraConfig, inject, set_adapter
from minilora.errors import ConfigError, DataError, KindError, StateError
from minilora.lora.slots import adapters_of
from minilora.lora.starts import EvaConfig
from minilora.many.eva import get_eva_state_dict, initialize_lora_eva_weights
from minilora.many.principal import Principal
from tests.compare import close, snapshot
from tests.models import Words

LAYERS = ["q", "k", "up", "down"]
PLAIN = {"forward_fn": lambda model, x: model(x), "prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}


class Block(nn.Module):
    """q and k see the same input; the others see their own."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 24), nn.Linear(24, 5)
        self.q.weight.data[2:] *= 0.1  # what up sees has few directions, so it gets fewer ranks

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.q(x) * torch.sigmoid(self.k(x)))))


def block():
    torch.manual_seed(0)
    return Block().train()


def batches():
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(16, 16, generator=generator) * torch.logspace(0, -2, 16)
    return [torch.randn(5, 9, 16, generator=generator) @ mix for _ in range(4)]


def config(**fields):
    own = {"r": 3, "lora_alpha": 12, "target_modules": LAYERS, "eva_config": EvaConfig(), **fields}
    return LoraConfig(init_lora_weights="eva", **own)


SETTINGS = {
    "usual": ({}, {}),
    "no redistribution": ({"rho": 1.0}, {}),
    # PEFT divides a direction once for each layer that has it, so here no two see the same input.
    "whitened": ({"whiten": True, "rho": 1.5}, {"target_modules": ["q", "up", "down"]}),
    "patterns": ({"tau": 0.9}, {"rank_pattern": {"up": 5}}),
}


@pytest.mark.parametrize(("own", "fields"), SETTINGS.values(), ids=SETTINGS)
def test_directions_and_ranks_are_those_of_peft(own, fields):
    peft = pytest.importorskip("peft")
    got = get_eva_state_dict(
        block(), batches(), config(eva_config=EvaConfig(**own), **fields), **PLAIN, show_progress_bar=False
    )
    words = {"r": 3, "lora_alpha": 12, "target_modules": LAYERS, **fields}
    theirs = peft.LoraConfig(init_lora_weights="eva", eva_config=peft.EvaConfig(**own), **words)
    want = peft.get_eva_state_dict(block(), batches(), theirs, **PLAIN, show_progress_bar=False)
    assert {path: len(u) for path, u in got.items()} == {path: len(u) for path, u in want.items()}
    for path, u in want.items():
        if len(u):
            close(got[path], u, 1e-3)


@pytest.mark.parametrize("adjust", [True, False])
def test_an_adapter_gets_its_ranks_and_begins_unchanged(adjust):
    model, x = inject(block(), config(eva_config=EvaConfig(adjust_scaling_factors=adjust))), batches()[0]
    want = model.eval()(x)
    found = get_eva_state_dict(model, batches(), **PLAIN, show_progress_bar=False)
    assert sum(map(len, found.values())) == 12 and len({len(u) for u in found.values()}) > 1
    found["down"] = found["down"][:0]
    initialize_lora_eva_weights(model, eva_state_dict=found)
    assert torch.equal(model(x), want)
    values = adapters_of(model).named("default")
    assert values.keys() == {path for path, u in found.items() if len(u)}
    for path, value in values.items():
        assert torch.equal(value.lora_A, found[path]) and not value.lora_B.any() and value.lora_B.requires_grad
        assert value.scaling == pytest.approx(4 if adjust else 12 / len(found[path]))
    assert isinstance(model.down, nn.Linear) and adapters_of(model).active == ("default",)
    again = inject(block(), adapters_of(model).configs["default"])
    assert {p: v.r for p, v in adapters_of(again).named("default").items()} == {p: v.r for p, v in values.items()}


def test_a_layer_that_is_not_in_the_dictionary_starts_as_usual():
    model = inject(block(), config(modules_to_save=["down"], target_modules=["q", "up"]))
    copied = adapters_of(model).named("default")["down"]
    with pytest.warns(UserWarning, match=r"initialized with init_lora_weights=True .*'up'"):
        initialize_lora_eva_weights(model, eva_state_dict={"q": torch.ones(2, 16)})
    values = adapters_of(model).named("default")
    assert values["up"].r == 3 and values["q"].r == 2 and values["down"] is copied and model.down is copied


def test_masked_tokens_and_labels_do_not_count():
    torch.manual_seed(0)
    ids, mask, labels = torch.randint(41, (6, 8)), torch.ones(6, 8, dtype=torch.long), torch.randint(41, (6, 8))
    mask[:, 6:], labels[:3] = 0, -100
    data = [{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    settings = LoraConfig(r=2, target_modules=["mid"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    run = {
        "forward_fn": lambda model, batch: model(batch["input_ids"], batch["attention_mask"]),
        "show_progress_bar": False,
    }
    got = get_eva_state_dict(Words(), data, settings, **run)["mid"]
    rows = []
    model = Words()
    model.mid.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    model(ids, mask)
    x = rows[0][(mask.bool() & (labels != -100))].double()
    V = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:2]
    close((got @ V.T.float()).abs(), torch.eye(2) + 1e-9, 1e-3)


def test_the_model_stays_as_it_is(capsys):
    model = inject(block(), config())
    before = snapshot(model)
    get_eva_state_dict(model, batches(), **PLAIN)
    assert snapshot(model) == before and "4 of 4 layers have converged" in capsys.readouterr().out
    assert not model.q.base_layer._forward_pre_hooks


def test_principal_directions_of_all_rows():
    data = torch.cat(batches()).reshape(-1, 16) + 3
    found = Principal(4, 0.99)
    for rows in data.split(45):
        assert found.add(rows)
    around = (data - data.mean(0)).double()
    _, S, Vh = torch.linalg.svd(around, full_matrices=False)
    close(found.sizes[:2], S[:2], 1e-2)
    close((found.directions[:2] @ Vh[:2].T.float()).abs(), torch.eye(2) + 1e-9, 2e-2)
    close(found.explained[:1], S[:1].square() / around.square().sum(), 1e-2)
    assert not Principal(4, 0.99).add(data[:3])


def test_what_is_refused():
    with pytest.raises(ConfigError, match="peft_config is required"):
        get_eva_state_dict(block(), batches(), **PLAIN)
    with pytest.raises(DataError, match="dataloader is empty"):
        get_eva_state_dict(block(), [], config(), **PLAIN)
    with pytest.raises(DataError, match="fewer tokens than a layer has directions"):
        get_eva_state_dict(block(), [batches()[0][:1, :2]], config(), **PLAIN, show_progress_bar=False)
    with pytest.raises(KindError, match="wanted a dict"):
        get_eva_state_dict(block(), batches(), config(), forward_fn=PLAIN["forward_fn"])
    with pytest.raises(ConfigError, match="other is no layer"):
        get_eva_state_dict(block(), batches(), config(), **{**PLAIN, "prepare_layer_inputs_fn": {"other": None}})
    model = inject(block(), config())
    with pytest.raises(StateError, match="dataloader is required"):
        initialize_lora_eva_weights(model)
    inject(model, LoraConfig(r=2, target_modules=["q"]), "b", activate=False)
    with pytest.raises(StateError, match="can only be used with"):
        initialize_lora_eva_weights(model, batches(), adapter_name="b")
    set_adapter(model, ["default", "b"])
    with pytest.raises(StateError, match="single active adapter"):
        initialize_lora_eva_weights(model, batches())

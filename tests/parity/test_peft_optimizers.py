"""The optimizers that PEFT has, against PEFT's: equal numbers after some steps."""

import copy
import math

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import peft.optimizers
import peft.optimizers.lorafa
from torch import nn

import minilora
from minilora.errors import ConfigError, KindError, StateError
from minilora.training.optim import create_loraplus_optimizer
from minilora.training.optim_choice import as_trained, optimizer_of
from minilora.training.optim_lora_fa import LoraFAOptimizer, create_lorafa_optimizer
from minilora.training.optim_riemannian import create_riemannian_optimizer
from minilora.training.settings import TrainConfig
from tests.compare import close
from tests.models import standing

# PEFT's check of shapes takes the bias of lora_bias for a broken factor.
pytestmark = pytest.mark.filterwarnings(r"ignore:Adapter 'default'. \d+ LoRA tensor\(s\) have invalid shape")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.first, self.last = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x):
        return self.last(torch.tanh(self.first(self.norm(self.embedding(x)))))


FIELDS = {"r": 3, "lora_alpha": 12, "target_modules": ["first", "last"], "rank_pattern": {"last": 2}}


def pair(**fields):
    """The same net, adapted by minilora and by PEFT, with the same random factors."""
    torch.manual_seed(0)
    base = Net()
    ours = minilora.get_peft_model(copy.deepcopy(base), minilora.LoraConfig(**{**FIELDS, **fields}))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{**FIELDS, **fields}))
    values = {key: torch.randn_like(value) * 0.3 for key, value in minilora.get_peft_model_state_dict(ours).items()}
    minilora.set_peft_model_state_dict(ours, values)
    peft.set_peft_model_state_dict(theirs, values)
    return ours, theirs


def states(ours, theirs):
    return minilora.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs)


def run(model, optimizer, steps=4):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randint(11, (4, 7), generator=generator)
        nn.functional.cross_entropy(model(x).flatten(0, 1), torch.randint(5, (28,), generator=generator)).backward()
        optimizer.step()


def equal_after(ours, theirs, mine, other, tolerance=2e-5):
    before = {key: value.clone() for key, value in states(ours, theirs)[0].items()}
    run(ours, mine)
    run(theirs, other)
    got, want = states(ours, theirs)
    assert got.keys() == want.keys()
    for key in want:
        close(got[key], want[key], tolerance)
    return [key for key in got if torch.equal(got[key], before[key])]


VARIOUS = {
    "plain": {},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "embedding, copies and biases": {
        "target_modules": ["embedding", "first"],
        "rank_pattern": {},
        "modules_to_save": ["norm", "last"],
    },
}


@pytest.mark.parametrize("fields", VARIOUS.values(), ids=VARIOUS)
def test_lora_plus(fields):
    ours, theirs = pair(**fields)
    words = {"lr": 1e-2, "loraplus_lr_ratio": 5.0, "loraplus_lr_embedding": 3e-3, "loraplus_weight_decay": 0.4}
    mine = create_loraplus_optimizer(ours, torch.optim.AdamW, **words, eps=1e-6)
    other = peft.optimizers.create_loraplus_optimizer(theirs, torch.optim.AdamW, **words, eps=1e-6)
    for left, right in zip(mine.param_groups, other.param_groups, strict=True):
        assert (left["lr"], left["weight_decay"], left["eps"]) == (right["lr"], right["weight_decay"], right["eps"])
        assert [p.shape for p in left["params"]] == [p.shape for p in right["params"]]
    assert equal_after(ours, theirs, mine, other) == []


def test_lora_plus_without_adapters_and_with_a_wrong_rate():
    optimizer = create_loraplus_optimizer(Net(), torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2.0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 0, 0, 4]
    with pytest.raises(ConfigError, match="loraplus_lr_ratio=0"):
        create_loraplus_optimizer(Net(), torch.optim.SGD, lr=0.1, loraplus_lr_ratio=0)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_lora_fa(rslora, decay, monkeypatch):
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)  # it would round the projection
    ours, theirs = pair(use_rslora=rslora, bias="all")
    words = {"r": 3, "lora_alpha": 12, "lr": 1e-2, "weight_decay": decay}
    still = equal_after(
        ours,
        theirs,
        create_lorafa_optimizer(ours, **words),
        peft.optimizers.create_lorafa_optimizer(theirs, **words),
        1e-4,
    )
    assert still == [key for key in states(ours, theirs)[0] if "lora_A" in key] != []


def test_lora_fa_by_name_in_a_run(monkeypatch):
    """What ``TrainConfig(optimizer="lora_fa")`` makes takes PEFT's steps."""
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    ours, theirs = pair(bias="all", use_rslora=True)
    train = TrainConfig(optimizer="lora_fa", lr=1e-2, weight_decay=0.3)
    with as_trained(ours, train):
        named = {name: p for name, p in ours.named_parameters() if p.requires_grad}
        mine = optimizer_of(ours, named, train)
        other = peft.optimizers.create_lorafa_optimizer(theirs, r=3, lora_alpha=12, lr=1e-2, weight_decay=0.3)
        before = {key: value.clone() for key, value in states(ours, theirs)[0].items()}
        run(ours, mine, 20)
        run(theirs, other, 20)
    got, want = states(ours, theirs)
    for key in want:
        close(got[key], want[key], 1e-3)
        assert torch.equal(got[key], before[key]) == ("lora_A" in key), key


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_lora_fa_beside_what_else_trains(fields):
    """PEFT takes the parameters in pairs, and a magnitude or a bias of B shifts all pairs after it."""
    ours, _ = pair(**fields)
    before = {key: value.clone() for key, value in minilora.get_peft_model_state_dict(ours).items()}
    run(ours, create_lorafa_optimizer(ours, 3, 12, 1e-2))
    for key, value in minilora.get_peft_model_state_dict(ours).items():
        assert torch.equal(value, before[key]) == ("lora_A" in key), key


def test_lora_fa_is_the_closest_step_to_the_gradient_of_the_weight():
    torch.manual_seed(0)
    A, B = torch.randn(3, 8), nn.Parameter(torch.zeros(5, 3))
    whole, s = torch.randn(5, 8), 4.0
    group = {"params": [nn.Parameter(A), B], "names": ["l.lora_A", "l.lora_B"], "scaling_factors": [s, s]}
    optimizer = LoraFAOptimizer([group], betas=(0.0, 0.0))
    B.grad = s * whole @ A.T
    optimizer.step()
    best = torch.linalg.lstsq(s * A.T.double(), whole.T.double()).solution.T
    close(optimizer.state[B]["exp_avg"], best)


def test_lora_fa_on_an_embedding_trains_the_factor_that_starts_at_zero():
    torch.manual_seed(0)
    model = minilora.get_peft_model(Net(), minilora.LoraConfig(r=3, lora_alpha=12, target_modules=["embedding"]))
    layer = standing(model, "embedding")
    random = layer.lora_embedding_B.detach().clone()
    run(model, create_lorafa_optimizer(model, 3, 12, 1e-2))
    assert torch.equal(layer.lora_embedding_B, random) and layer.lora_embedding_A.any()
    assert not layer.lora_embedding_B.requires_grad


def test_lora_fa_goes_on_from_a_state_dict():
    ours, _ = pair()
    twin = copy.deepcopy(ours)
    optimizer = create_lorafa_optimizer(ours, 3, 12, 1e-2)
    run(ours, optimizer)
    other = create_lorafa_optimizer(twin, 3, 12, 1e-2)
    twin.load_state_dict(ours.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(ours, optimizer)
    run(twin, other)
    for left, right in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


def test_lora_fa_says_what_does_not_fit():
    ours, _ = pair()
    with pytest.raises(ConfigError, match="was passed to create_lorafa_optimizer"):
        create_lorafa_optimizer(ours, 3, 12, 1e-2, use_rslora=True)
    assert standing(ours, "first").lora_A.requires_grad
    with pytest.warns(UserWarning, match="adapter 'default' has r=3, lora_alpha=12"):
        create_lorafa_optimizer(ours, 8, 12, 1e-2)
    with pytest.warns(FutureWarning, match="deprecated"):
        create_lorafa_optimizer(ours, 3, 12, 1e-2, use_rslora=False)
    with pytest.raises(StateError, match="no adapters"):
        create_lorafa_optimizer(Net(), 3, 12, 1e-2)
    with pytest.raises(ConfigError, match="names"):
        LoraFAOptimizer([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ConfigError, match="betas"):
        LoraFAOptimizer([], betas=(1.0, 0.9))


@pytest.mark.parametrize("fields", VARIOUS.values(), ids=VARIOUS)
@pytest.mark.parametrize(
    ("kind", "words"), [(torch.optim.AdamW, {"weight_decay": 0.1}), (torch.optim.SGD, {"momentum": 0.9})]
)
def test_riemannian(fields, kind, words):
    ours, theirs = pair(**fields)
    mine = create_riemannian_optimizer(ours, kind, lr=1e-2, reg=0.03, **words)
    other = peft.optimizers.create_riemannian_optimizer(theirs, kind, lr=1e-2, reg=0.03, **words)
    assert isinstance(mine, kind)
    assert equal_after(ours, theirs, mine, other, 1e-4) == []


def test_riemannian_says_what_it_cannot_do():
    ours, _ = pair()
    with pytest.raises(KindError, match=r"subclass of torch\.optim\.Optimizer") as caught:
        create_riemannian_optimizer(ours, dict, lr=0.1)
    assert isinstance(caught.value, TypeError)
    with pytest.raises(ConfigError, match="lora_A/lora_B parameter pairs"):
        create_riemannian_optimizer(Net(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match="requires a closure"):
        create_riemannian_optimizer(ours, torch.optim.LBFGS, lr=0.1)
    for reg in (0, math.nan, math.inf, True):
        with pytest.raises(ConfigError, match="reg="):
            create_riemannian_optimizer(ours, torch.optim.SGD, lr=0.1, reg=reg)
    optimizer = create_riemannian_optimizer(ours, torch.optim.SGD, lr=0.1)
    for call in (lambda: optimizer.step(lambda: None), lambda: optimizer.step(closure=lambda: None)):
        with pytest.raises(ConfigError, match="does not support closures"):
            call()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_riemannian_in_half_precision(kind):
    ours, _ = pair()
    ours.to(kind)
    optimizer = create_riemannian_optimizer(ours, torch.optim.SGD, lr=0.1, reg=1e-4)
    A, B = standing(ours, "first").lora_A, standing(ours, "first").lora_B
    A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
    gram = A.double() @ A.double().T + 1e-4 * torch.eye(3).double()
    want = B.grad.double() @ torch.linalg.inv(gram)
    optimizer.step()
    assert A.grad.dtype == kind and A.grad.isfinite().all()
    close(B.grad, want, 1e-2)

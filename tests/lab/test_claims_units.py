"""Claims on LoRA's units, first steps, memory, room and intruders: each runs on a tiny ground, and planted results turn its verdict."""

import math

import pytest
import torch

from minilora.data.encoding import Encoded
from minilora.errors import ConfigError
from minilora.lab.claims import adam, fa_memory, first_step, intruders, lora_plus, rank_1
from minilora.lab.ground import by_hand
from minilora.lab.ground.claim import FAILS, HOLDS, UNDECIDED
from minilora.lab.ground.ground import Ground
from minilora.lab.sweeps.trial import Result
from minilora.lab.verdicts import interval

pytest.importorskip("transformers")
VERDICTS = {HOLDS, FAILS, UNDECIDED}


def tiny():
    """A ground of two steps and a model of one narrow layer, no weight of it square but the query's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ground = Ground(steps=2, say=lambda line: None)
    shape = {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=1, initializer_range=0.2, **shape))
        rows = torch.randint(1, 256, (24, 11)).tolist()
    examples = [Encoded(tuple(row), tuple(row)) for row in rows]
    ground.model = model.eval().requires_grad_(False)
    ground.lesson, ground.held_out, ground.prose = examples, examples[:3], examples[3:5]
    return ground


@pytest.fixture(scope="module")
def ground():
    return tiny()


class Planted(Ground):
    """A ground on which every trial ends at once, with the loss that ``loss`` gives it."""

    def __init__(self, loss):
        super().__init__(steps=2, say=lambda line: None)
        self.loss = loss

    def results(self, trials, model=None, lesson=None, key=""):
        made = []
        for trial in trials:
            result = Result(trial, "planted", parameters=1000)
            noise = 1e-3 * trial.train.seed
            result.records.append({"step": 2, "eval_loss": self.loss(trial, key) + noise})
            made.append(result)
        return made


# ---- the loop written out


def test_a_loop_by_hand_is_adamw_in_groups(ground):
    """Against the same training without the module under test."""
    recipe = by_hand.Recipe(
        size_A=2.0, alpha=12, rate_A=1e-2, rate_B=3e-2, eps_A=1e-3, eps_B=1e-4, weight_decay=0.1, clip=0.5
    )
    found = by_hand.train_by_hand(ground, recipe, 3, 3, seed=1)
    model = by_hand.adapted(ground, 1, r=3, lora_alpha=12)
    A = [p for n, p in model.named_parameters() if "lora_A" in n]
    B = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert len(A) == len(B) == 7
    for factor in A:
        factor.data *= 2
    one, two = (
        torch.optim.AdamW(A, 1e-2, eps=1e-3, weight_decay=0.1),
        torch.optim.AdamW(B, 3e-2, eps=1e-4, weight_decay=0.1),
    )
    for loss, batch in zip(found, by_hand.batches(ground, 1, 3), strict=True):
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        assert float(mean.detach()) == pytest.approx(loss, abs=1e-5)
        mean.backward()
        torch.nn.utils.clip_grad_norm_(A + B, 0.5)
        one.step(), two.step()
        model.zero_grad()


def test_the_ground_stays_as_it_was(ground):
    before, state = {n: v.clone() for n, v in ground.model.state_dict().items()}, torch.get_rng_state()
    by_hand.train_by_hand(ground, by_hand.Recipe(rate_B=1e-2), 2, 1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in ground.model.state_dict().items())


def test_a_gap():
    assert by_hand.largest_gap([1.0, 2.0], [1.5, 1.75]) == 0.5
    assert math.isnan(by_hand.largest_gap([1.0, math.nan], [1.0, 2.0]))


# ---- the claims, run and planted


@pytest.mark.parametrize("claim", [lora_plus, adam])
def test_laws_of_units(claim, ground, monkeypatch):
    assert claim.run(ground).verdict == HOLDS
    real = claim.train_by_hand

    def wrong(ground, recipe, *rest):  # a training that depends on the size of A alone
        return [loss + 1e-3 * recipe.size_A for loss in real(ground, recipe, *rest)]

    monkeypatch.setattr(claim, "train_by_hand", wrong)
    assert claim.run(ground).verdict == FAILS
    monkeypatch.setattr(claim, "train_by_hand", lambda *_: [math.nan])
    assert claim.run(ground).verdict == FAILS


def test_the_law_needs_its_units(ground, monkeypatch):
    """Without Adam it is none."""
    monkeypatch.setattr(adam, "BASE", by_hand.Recipe(rate_A=1e-1, rate_B=2e-1, sgd=True))
    assert adam.run(ground).verdict == FAILS


def test_first_steps(ground, monkeypatch):
    monkeypatch.setattr(first_step, "SEEDS", range(2))
    monkeypatch.setattr(first_step, "RANKS", (1, 8, 64))
    found = first_step.run(ground)
    assert found.verdict in VERDICTS and len(found.rows) == 4
    rows = {row["case"]: row["off by"].mean for row in found.rows}
    assert all(abs(off) < 0.3 for off in rows.values())  # 0.5 is another law


def test_first_steps_progress_is_the_gradients(ground, monkeypatch):
    """SGD's first step is ``-rate s^2 G A^T A``, so its progress is ``s^2 |G A^T|^2 / |G|``."""
    monkeypatch.setattr(first_step, "RANKS", (3,))
    (found,) = first_step._progress(ground, 4)["SGD", "alpha/r"]
    (batch,) = by_hand.batches(ground, 4, 1)
    G = by_hand.weight_gradients(ground, batch)
    model = by_hand.adapted(ground, 4, r=3)
    parts = [(G[path], adapter) for path, adapter in first_step.fixed_updates(model, "default").items()]
    along = sum(
        float((adapter.scaling * g @ adapter.lora_A.detach().T).double().square().sum()) for g, adapter in parts
    )
    assert found == pytest.approx(along / math.sqrt(sum(float(g.double().square().sum()) for g, _ in parts)), rel=1e-4)


@pytest.mark.parametrize(("shift", "spread", "verdict"), [(0, 0, HOLDS), (0.2, 0, FAILS), (0, 0.2, UNDECIDED)])
def test_first_steps_planted(shift, spread, verdict, monkeypatch):
    def progress(_, seed):
        wrong = shift + spread * (seed % 2)
        return {case: [r ** (e + wrong) for r in first_step.RANKS] for case, e in first_step.EXPONENTS.items()}

    monkeypatch.setattr(first_step, "_progress", progress)
    assert first_step.run(None).verdict == verdict


def test_kept_bytes_are_counted_by_hand():
    """LoRA keeps x and A x; LoRA-FA A x alone: 5 and 3 numbers a token of 4 bytes, and what the loss keeps is the same."""
    from minilora import LoraConfig, inject

    def kept(variant, r):
        model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 4))
        inject(model, LoraConfig(r=r, lora_alpha=12, target_modules=["0"]), variant=variant)
        return fa_memory.kept_bytes(model, torch.randn(11, 5))

    fa_memory_loss = fa_memory.mean_loss
    try:
        fa_memory.mean_loss = lambda model, x: model(x).sum()
        assert kept("lora", 3) - kept("lora_fa", 3) == 11 * 5 * 4
        assert kept("lora", 4) - kept("lora", 3) == kept("lora_fa", 4) - kept("lora_fa", 3) == 11 * 4
    finally:
        fa_memory.mean_loss = fa_memory_loss


@pytest.mark.parametrize(("a_rank", "ratio", "verdict"), [(0, 1.5, HOLDS), (10, 1.5, FAILS), (0, 1.1, FAILS)])
def test_memory_planted(a_rank, ratio, verdict, ground, monkeypatch):
    def kept(model, _):
        adapter = next(m for m in model.modules() if hasattr(m, "lora_A"))
        return (1000 + a_rank * adapter.r) * (ratio if adapter.lora_A.requires_grad else 1)

    monkeypatch.setattr(fa_memory, "kept_bytes", kept)
    assert fa_memory.run(ground).verdict == verdict


def test_rank_1(ground, monkeypatch):
    monkeypatch.setattr(rank_1, "FEW", 2)
    monkeypatch.setattr(rank_1, "MANY", 5)
    found = rank_1.run(ground)
    assert found.verdict in VERDICTS
    assert [(row["facts"], row["r"]) for row in found.rows] == [(2, 1), (2, 16), (5, 1), (5, 16)]
    assert rank_1.share_known(0.0) == 1 and rank_1.share_known(32 * math.log(2) / 9) == pytest.approx(0)
    assert rank_1.share_known(math.inf) == 0


@pytest.mark.parametrize(
    ("few", "many", "verdict"), [((0.1, 0.1), (2, 1), HOLDS), ((1, 0.1), (2, 1), FAILS), ((0.1, 0.1), (1, 1), FAILS)]
)
def test_rank_1_planted(few, many, verdict):
    def loss(trial, key):
        return (few if key.startswith("16 ") else many)[trial.lora.r == 16]

    assert rank_1.run(Planted(loss)).verdict == verdict


def test_intruders(ground, monkeypatch):
    monkeypatch.setattr(intruders, "RANKS", (2, 3))
    monkeypatch.setattr(intruders, "ALL_RATES", (1e-3, 3e-1))
    found = intruders.run(ground)
    assert found.verdict in VERDICTS and found.rows[0]["0.001"] == 0
    of = {(r.trial.lora.r, r.trial.train.lr, r.trial.train.seed): r for r in ground.done.values()}
    strong = of[2, 3e-1, 0]
    assert intruders.count(ground, strong) > 0  # counted of the trained adapter, not of a fresh one
    for name in strong.weights:
        strong.weights[name] = torch.zeros_like(strong.weights[name])
    assert intruders.count(ground, strong) == 0


@pytest.mark.parametrize(("per_decade", "verdict"), [(5, HOLDS), (-5, FAILS), (0, UNDECIDED)])
def test_intruders_planted(per_decade, verdict, monkeypatch):
    def count(_, result):
        return (
            30
            + per_decade * math.log10(result.trial.train.lr)
            + (0, 0.5, -0.5)[result.trial.train.seed] * result.trial.train.lr
        )

    monkeypatch.setattr(intruders, "count", count)
    ground = Planted(lambda trial, key: abs(math.log(trial.train.lr / 1e-3)))
    found = intruders.run(ground)
    assert found.verdict == verdict
    assert {row["best rate"] for row in found.rows} == {1e-3}


def test_a_run_that_diverged_is_left_out():
    assert intruders.growth({0.1: {0: 1, 1: 2}, 1.0: {0: 3, 1: 4}, 10.0: {1: 6}}).mean == 2.0


def test_a_slope():
    assert interval.slope([(1, 5), (3, 1), (2, 3)]) == pytest.approx(-2)
    with pytest.raises(ConfigError, match="two different x"):
        interval.slope([(1, 2), (1, 3)])

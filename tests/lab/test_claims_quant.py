"""The claims on quantization: each runs on a tiny ground, and its verdict follows what is found, whichever way."""

import copy
import math

import pytest
import torch

from minilora.data.encoding import Encoded
from minilora.errors import MissingPackageError
from minilora.lab.claims import claim, double_quant, formats, loftq, merge_4bit, qlora
from minilora.lab.ground import ground as ground_file
from minilora.lab.ground.claim import FAILS, HOLDS, UNDECIDED
from minilora.lab.ground.ground import RATES, SEEDS, Ground, Tuned
from minilora.lab.ground.rounding import harm, rounded
from minilora.lab.sweeps.trial import Result
from minilora.lab.verdicts.interval import Interval, interval
from minilora.linear.layers import dense_weight
from minilora.quant.blockwise import quantize
from minilora.quant.config import QuantConfig
from tests import models

NAMES = ("formats", "double-quant", "loftq", "qlora", "merge-4bit")


def tiny(seed):
    model = models.llama(seed, vocab_size=256, max_position_embeddings=128, attention_bias=True)
    return model.requires_grad_(False)


def text(count, length=24):
    drawn = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(count)).tolist()
    return [Encoded(tuple(row), tuple(row)) for row in drawn]


class Tiny(Ground):
    """Two steps, a rate and two seeds, on random text."""

    def __init__(self):
        super().__init__(steps=2, say=lambda line: None)
        self.model, self.lesson, self.held_out, self.prose = tiny(0), text(20), text(4), text(8)

    def second(self):
        return tiny(1), text(9)

    def tune(self, families, rates=RATES, seeds=SEEDS, **options):
        return super().tune(families, rates[:1], seeds[:2], **options)


@pytest.fixture(scope="module")
def ground():
    return Tiny()


@pytest.mark.parametrize("name", NAMES)
def test_a_claim_runs(name, ground):
    before = copy.deepcopy(ground.model.state_dict())
    found = claim(name).run(ground)
    assert found.verdict in (HOLDS, FAILS, UNDECIDED) and found.said.endswith(".") and len(found.rows) >= 2
    assert "nan" not in found.said and "inf" not in found.said.replace("-inf", "").replace("to inf", "")
    assert all(torch.equal(value, before[key]) for key, value in ground.model.state_dict().items())


# ---- verdicts on what was planted


def spread(mean):
    """A value for each piece or seed, close to each other."""
    return {number: mean * (1 + 0.01 * (number - 1)) for number in range(3)}


def sure(mean):
    return Interval(mean, mean - 1e-4, mean + 1e-4)


def test_formats_planted():
    right = {name: spread(kl) for name, kl in {"nf4": 1, "fp4": 2, "e2m1": 2.5, "e3m0": 2.2, "int4": 3}.items()}
    assert set(formats.judged(right).values()) == {HOLDS}
    wrong = right | {"fp4": spread(4)}
    assert {step for step, how in formats.judged(wrong).items() if how == FAILS} == {"fp4 before int4"}
    close = right | {"nf4": {0: 1.0, 1: 3.0, 2: 2.0}}
    assert formats.judged(close)["nf4 before fp4"] == UNDECIDED


@pytest.mark.parametrize(
    ("saved", "cost", "verdict"),
    [
        (0.372, sure(0.002), HOLDS),
        (0.372, sure(-0.01), HOLDS),
        (0.372, sure(0.2), FAILS),
        (0.25, sure(0.002), FAILS),
        (0.372, Interval(0.05, -0.1, 0.2), UNDECIDED),
    ],
)
def test_double_quant_planted(saved, cost, verdict):
    assert double_quant.judged(saved, cost) == verdict


@pytest.mark.parametrize(
    ("two", "four", "verdict"),
    [(0.1, 0.001, HOLDS), (0.001, 0.001, FAILS), (0.1, 0.05, FAILS), (0.01, 0.001, UNDECIDED)],
)
def test_loftq_planted(two, four, verdict):
    assert loftq.judged({2: sure(two), 4: sure(four)}) == verdict


@pytest.mark.parametrize(
    ("four", "sixteen", "verdict"), [(0.02, 1.0, HOLDS), (0.5, 1.0, FAILS), (0.02, 0.5, FAILS), (0.1, 1.0, UNDECIDED)]
)
def test_merging_planted(four, sixteen, verdict):
    assert merge_4bit.judged({("4 bits", 0.01): sure(four), ("16 bits", 0.01): sure(sixteen)}) == verdict


class Planted(Tiny):
    """Every family ends at the loss that was planted for it, a thousandth apart by seed."""

    def __init__(self, losses):
        super().__init__()
        self.losses = losses

    def tune(self, families, rates=RATES, seeds=SEEDS, **options):
        def result(name, rate, seed):
            loss = self.losses[name] + seed * 1e-3 + abs(math.log(rate / 1e-3))
            records = [{"step": 0, "eval_loss": 2.0}, {"step": 60, "eval_loss": loss}]
            return Result(self.trial(rate, seed), name, records=records)

        return {
            name: Tuned(name, {rate: {seed: result(name, rate, seed) for seed in seeds} for rate in rates})
            for name in families
        }


@pytest.mark.parametrize(("packed", "verdict"), [(1.503, HOLDS), (1.53, FAILS), (1.45, FAILS)])
def test_qlora_planted(packed, verdict):
    found = qlora.run(Planted({"16 bits": 1.5, "4 bits": packed}))
    assert found.verdict == verdict and f"{packed - 1.5:.4f} after" in found.said and "best rates 0.001" in found.said


def test_loftq_compares_equal_bits():
    losses = {"2 bits, zero": 1.7, "2 bits, LoftQ": 1.6, "4 bits, zero": 1.5, "4 bits, LoftQ": 1.499}
    assert loftq.run(Planted(losses)).verdict == HOLDS
    assert loftq.run(Planted(losses | {"4 bits, LoftQ": 1.4})).verdict == FAILS


# ---- what is measured


@pytest.mark.parametrize("offset", [0, 5, 16])
def test_blocks_begin_where_they_should(offset):
    weight = torch.randn(24, 37, generator=torch.Generator().manual_seed(0))
    weight.view(-1)[offset + 64] = 90.0  # the first of its block: the block before it must not know
    found = rounded(weight, QuantConfig("nf4"), offset)
    first = weight.view(-1)[offset : offset + 64]
    assert torch.equal(found.view(-1)[offset : offset + 64], quantize(first, QuantConfig("nf4")).dequantize())
    inside = found.view(-1)[offset + 64 : offset + 128]
    assert inside[0] == 90.0 and not inside[1:].any()  # so large a scale leaves nothing of the rest of it
    if not offset:
        assert torch.equal(found, quantize(weight, QuantConfig("nf4")).dequantize())


def test_harm_is_the_kl_of_the_rounded_model():
    model, examples = tiny(2), text(4)
    found = harm(model, {"nf4": QuantConfig("nf4"), "int8": QuantConfig("int8")}, examples, pieces=2)
    worse = copy.deepcopy(model)
    for name, module in worse.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = rounded(module.weight, QuantConfig("nf4"), 32)
    ids = torch.tensor([example.input_ids for example in examples[2:]])
    was, now = (each(ids).logits[:, :-1].double().log_softmax(-1) for each in (model, worse))
    assert found["nf4"][1] == pytest.approx(float((was.exp() * (was - now)).sum(-1).mean()), rel=1e-3)
    assert all(0 < found["int8"][piece] < found["nf4"][piece] / 10 for piece in (0, 1))


def test_what_stays_of_an_update():
    """Of one that moves every weight to another level all stays; of one that reaches no threshold nothing does; bf16 keeps both."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.tensor([-1.0, 1.0])[torch.randint(0, 2, (20, 64), generator=generator)]
    W, flip, none = levels, -2 * levels, -0.01 * levels
    none[:, 0] = 0  # the scale of each block stays
    assert merge_4bit.share([(W, flip)], None, "4 bits") == pytest.approx(1)
    assert merge_4bit.share([(W, none)], None, "4 bits") == 0
    drawn, update = torch.randn(2, 20, 64, generator=generator)
    assert merge_4bit.share([(drawn, update)], 0.02, "16 bits") == pytest.approx(1, abs=0.02)


def test_the_update_is_that_of_the_adapter(ground):
    """alpha / r B A of every layer, beside the weight that it belongs to."""
    (result,) = ground.results([ground.trial(1e-2, 5)])
    layers = list(merge_4bit._updates(ground, result))
    assert len(layers) == 14 and all(W.shape == D.shape for W, D in layers)
    A = result.weights["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].double()
    B = result.weights["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].double()
    own = ground.model.model.layers[0].mlp.down_proj.weight
    (D,) = [D for W, D in layers if W.data_ptr() == own.data_ptr()]
    assert torch.allclose(D.double(), 4 * B @ A, atol=1e-6) and D.abs().max() > 0


def test_without_the_second_model(monkeypatch, ground):
    def missing(name):
        raise MissingPackageError("not installed")

    monkeypatch.setattr(ground_file, "load_model", missing)
    assert Ground.second(ground) is None
    monkeypatch.setattr(Tiny, "second", lambda self: None)
    found = formats.run(ground)
    assert "SmolLM2 is not installed" in found.said and {row["model"] for row in found.rows} == {"byte model"}


def test_bases_of_other_kinds(ground):
    wide, packed = ground.on(None, torch.bfloat16), ground.on(QuantConfig("nf4"), torch.bfloat16)
    assert {parameter.dtype for parameter in wide["model"].parameters()} == {torch.bfloat16}
    assert wide["key"] != packed["key"] and packed["key"] != ground.on(QuantConfig("nf4", double_quant=True))["key"]
    found = packed["model"].model.layers[0].mlp.up_proj
    exact = ground.model.model.layers[0].mlp.up_proj.weight.bfloat16()
    assert torch.equal(dense_weight(found), quantize(exact, QuantConfig("nf4")).dequantize())
    assert interval([1.0, 1.0]).half == 0 and ground.model.dtype == torch.float32

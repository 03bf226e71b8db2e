"""The measures against dense float64 oracles and exact cases, on dense and packed bases; and the model is left as it was."""

import csv
import io
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torch.optim.optimizer as optimizers
from torch import nn

from minilora import LoraConfig, get_peft_model, inject, merge, quantize_model, set_adapter
from minilora.data.batches import collate
from minilora.data.encoding import Encoded
from minilora.data.tokens import IGNORED
from minilora.errors import ConfigError, DataError, KindError, StateError, TargetError
from minilora.lab import measures
from minilora.lab.measures import (
    Norms,
    alignment,
    divergence,
    effective_rank,
    forgetting,
    intruder_dimensions,
    landscape,
    similarity_grid,
    spectrum,
    stable_rank,
    subspace_similarity,
    update_norms,
)
from minilora.linear.layers import dense_weight
from minilora.lora.adapter import Adapter
from minilora.lora.slots import adapters_of
from minilora.lora.update import low_rank
from minilora.many.adapted import disabled
from minilora.quant.config import QuantConfig
from minilora.training.loop import TrainConfig, train
from minilora.training.losses import evaluate, token_losses
from tests.compare import close
from tests.models import Words, lora, randomize


def texts(seed=0, lengths=(7, 2, 11, 5), vocabulary=41):
    """Examples of which some labels do not count."""
    generator, made = torch.Generator().manual_seed(seed), []
    for length in lengths:
        ids = torch.randint(1, vocabulary, (length,), generator=generator).tolist()
        made.append(Encoded(tuple(ids), tuple([IGNORED] * (length // 3) + ids[length // 3 :])))
    return made


def words(packed=False, start="random", **fields):
    """A small language model with an adapter on its middle layer."""
    model = Words().eval()
    if packed:
        quantize_model(model, QuantConfig("nf4", 32), ["mid"])
    inject(model, lora(["mid"], **fields))
    return randomize(model) if start == "random" else model


def mixed(packed=False):
    """Layers of unequal r and lora_alpha, none square, with biases."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7), nn.Tanh(), nn.Linear(7, 11)).eval()
    if packed:
        quantize_model(model, QuantConfig("nf4", 32), ["0", "2", "4"])
    fields = {"r": 3, "lora_alpha": 12, "rank_pattern": {"2": 5, "4": 9}, "alpha_pattern": {"2": 2}}
    return randomize(inject(model, LoraConfig(target_modules=["0", "2", "4"], **fields)))


def delta(adapter):
    """The update in fp64, from the parameters."""
    return adapter.scaling * (adapter.lora_B.detach().double() @ adapter.lora_A.detach().double())


def all_logits(model, ids):
    """Of one text in fp64, by a copy of the formula of ``Words`` with the layers' whole weights."""

    def layer(module, x):
        bias = module.innermost.bias if isinstance(module, Adapter) else module.bias
        weight = dense_weight(module.innermost if isinstance(module, Adapter) else module).double()
        update = delta(module) if isinstance(module, Adapter) else 0
        return F.linear(x, weight + update, bias.double())

    with torch.no_grad():
        hidden = model.embed.weight.double()[list(ids)].cumsum(0) / 4
        return layer(model.head, torch.tanh(layer(model.mid, hidden)))


# ---- nothing is left behind


EVERY = {
    "forgetting": lambda model, name: forgetting(model, texts(), name),
    "spectrum": lambda model, name: spectrum(model, name),
    "intruders": lambda model, name: intruder_dimensions(model, adapter_name=name),
    "alignment": lambda model, name: alignment(model, texts(), name),
    "norms": lambda model, name: update_norms(model, name),
    "landscape": lambda model, name: landscape(model, texts(), [0, 0.7], name),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("measure", EVERY)
def test_the_model_is_left_as_it_was(measure, packed, snapshot):
    model = words(packed)
    inject(model, lora(["mid"], r=2), "other")
    randomize(model, 5)
    model.train()
    model.head.eval()  # a mode of its own
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    before, state = snapshot(model), torch.get_rng_state()
    modes = {path: module.training for path, module in model.named_modules()}
    grads = {name: p.grad for name, p in model.named_parameters()}
    EVERY[measure](model, "default")
    assert snapshot(model) == before and torch.equal(torch.get_rng_state(), state)
    assert {path: module.training for path, module in model.named_modules()} == modes
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    assert adapters_of(model).active == ("other",)
    assert all(p.grad is None or torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())


@pytest.mark.parametrize("measure", EVERY)
def test_one_adapter_of_several_is_measured_alone(measure):
    model = words()
    alone = EVERY[measure](model, "default")
    inject(model, lora(["mid"], r=2), "other")
    randomize(model, 5)
    both = EVERY[measure](model, "default"), EVERY[measure](model, "other")
    set_adapter(model, ["default", "other"])
    assert repr(EVERY[measure](model, "default")) == repr(both[0]) == repr(alone) != repr(both[1])


@pytest.mark.parametrize("measure", EVERY)
def test_what_is_not_there_is_refused_by_name(measure):
    with pytest.raises(StateError, match="has no adapters"):
        EVERY[measure](Words(), "default")
    with pytest.raises(StateError, match="mine"):
        EVERY[measure](words(), "mine")


@pytest.mark.parametrize("measure", ["forgetting", "alignment", "landscape"])
def test_a_model_that_would_not_show_the_adapter_is_refused(measure):
    model = words()
    with disabled(model), pytest.raises(StateError, match="switched off"):
        EVERY[measure](model, "default")
    merge(model)
    with pytest.raises(StateError, match="unmerge"):
        EVERY[measure](model, "default")


@pytest.mark.parametrize("measure", [spectrum, intruder_dimensions, update_norms, Norms])
def test_an_update_that_depends_on_the_input_has_no_matrix(measure):
    model = inject(Words(), lora(["mid"], alora_invocation_tokens=[3]))
    with pytest.raises(StateError, match=r"mid.*each input"):
        measure(model)


def test_public_names():
    assert all(getattr(measures, name).__module__.startswith("minilora.lab.measures.") for name in measures.__all__)


@pytest.mark.parametrize("measure", EVERY)
def test_a_model_with_the_names_of_peft_is_measured_alike(measure, make_llama):
    def model(adapt):
        return randomize(adapt(make_llama(0), lora(["q_proj", "down_proj"])))

    assert repr(EVERY[measure](model(get_peft_model), "default")) == repr(EVERY[measure](model(inject), "default"))


# ---- forgetting


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("size", "at_a_time"), [(1, 256), (3, 4), (8, 1)])
def test_forgetting_is_the_divergence_of_all_predictions(packed, size, at_a_time):
    model, kl, losses = words(packed), [], [[], []]
    found = forgetting(model, texts(), batch_size=size, tokens_at_a_time=at_a_time)
    for example in texts():
        wanted = torch.tensor(example.input_ids[1:])
        new = all_logits(model, example.input_ids)[:-1].log_softmax(1)
        with disabled(model):
            old = all_logits(model, example.input_ids)[:-1].log_softmax(1)
        kl += (old.exp() * (old - new)).sum(1).tolist()
        for each, log in zip(losses, (old, new), strict=True):
            each += (-log.gather(1, wanted[:, None])).flatten().tolist()
    assert found.tokens == len(kl) == sum(len(example.input_ids) - 1 for example in texts())
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-5) and found.kl > 0.01
    assert found.base_loss == pytest.approx(sum(losses[0]) / len(kl), rel=1e-6)
    assert found.adapted_loss == pytest.approx(sum(losses[1]) / len(kl), rel=1e-6)
    assert found.loss_difference == found.adapted_loss - found.base_loss != 0


def test_forgetting_by_the_head_is_that_of_all_logits(make_llama, monkeypatch):
    model = randomize(inject(make_llama(0), lora(["q_proj", "down_proj"])))
    some = texts(vocabulary=64)
    by_head = forgetting(model, some, tokens_at_a_time=5)
    monkeypatch.setattr(divergence, "why_all_logits", lambda model: "asked")
    plain = forgetting(model, some, batch_size=2, tokens_at_a_time=5)
    assert by_head.kl == pytest.approx(plain.kl, rel=1e-4) and by_head.kl > 1e-3
    assert (by_head.base_loss, by_head.adapted_loss) == pytest.approx((plain.base_loss, plain.adapted_loss), rel=1e-6)


def test_forgetting_holds_the_logits_of_few_tokens(make_llama, monkeypatch):
    model = randomize(inject(make_llama(0), lora(["q_proj"])))
    sizes, true = [], divergence.divergence
    monkeypatch.setattr(divergence, "divergence", lambda *pair: sizes.append(len(pair[0])) or true(*pair))
    forgetting(model, texts(vocabulary=64), batch_size=4, tokens_at_a_time=6)
    assert sizes == [6, 6, 6, 3]


@pytest.mark.parametrize("packed", [False, True])
def test_a_zero_update_forgets_nothing(packed):
    found = forgetting(words(packed, start="zero"), texts())
    assert found.kl == 0 == found.loss_difference and found.base_loss > 1


def test_forgetting_and_alignment_in_bf16_are_those_of_fp32(make_llama):
    def model(kind):
        return randomize(inject(make_llama(0).bfloat16().to(kind), lora(["q_proj", "down_proj"])))

    some = texts(vocabulary=64)
    half, full = forgetting(model(torch.bfloat16), some), forgetting(model(torch.float32), some)
    assert half.kl == pytest.approx(full.kl, rel=0.1) and half.base_loss == pytest.approx(full.base_loss, rel=0.02)
    assert alignment(model(torch.bfloat16), some) == pytest.approx(alignment(model(torch.float32), some), abs=0.02)


def test_forgetting_with_an_adapted_head():
    model = randomize(inject(Words().eval(), lora(["mid", "head"])))
    found = forgetting(model, texts(lengths=(9,)))
    ids = texts(lengths=(9,))[0].input_ids
    new = all_logits(model, ids)[:-1].log_softmax(1)
    with disabled(model):
        old = all_logits(model, ids)[:-1].log_softmax(1)
    assert found.kl == pytest.approx(float((old.exp() * (old - new)).sum(1).mean()), rel=1e-5)


def test_what_the_base_rules_out_adds_nothing():
    p, q = torch.tensor([[0.5, -math.inf, 1.0]]), torch.tensor([[0.5, 2.0, 1.0]])
    want = math.log(math.exp(0.5) + math.exp(2) + math.exp(1)) - math.log(math.exp(0.5) + math.exp(1))
    assert float(divergence.divergence(p, q)) == pytest.approx(want)
    assert math.isinf(float(divergence.divergence(q, p)))


def test_texts_that_cannot_be_used_are_refused():
    for bad, said in (([], "no example"), ([Encoded((3,), (3,))], "1 tokens"), ([Encoded((3, 99), (3, 99))], "99")):
        model = words()
        model.get_input_embeddings = lambda model=model: model.embed
        with pytest.raises(DataError, match=said):
            forgetting(model, bad)
    for field in ("batch_size", "tokens_at_a_time"):
        with pytest.raises(ConfigError, match=field):
            forgetting(words(), texts(), **{field: 0})


# ---- spectra


@pytest.mark.parametrize("packed", [False, True])
def test_spectra_are_those_of_the_dense_updates(packed):
    model = mixed(packed)
    found = spectrum(model)
    assert {path: len(values) for path, values in found.items()} == {"0": 3, "2": 5, "4": 7}  # r = 9 of 7 inputs
    for path, values in found.items():
        wanted = torch.linalg.svdvals(delta(model[int(path)]))
        close(values, wanted[: len(values)].float(), 1e-5)
        assert float(wanted[len(values) :].sum()) < 1e-6
        assert torch.equal(spectrum(model[int(path)]), values)


@pytest.mark.parametrize("variant", ["pissa", "vera", "dora", "olora"])
def test_spectra_of_other_variants(variant):
    torch.manual_seed(0)
    fields = {"init_lora_weights": variant} if variant in ("pissa", "olora") else {"use_dora": variant == "dora"}
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 7))
    randomize(inject(model, lora(["0", "1"], **fields), variant=variant))
    assert (low_rank(model[0]) is None) == (variant == "dora")
    for path, values in spectrum(model).items():
        update = model[int(path)].delta_weight().detach().double()
        wanted = torch.linalg.svdvals(update).float()
        count = min(len(values), len(wanted))
        torch.testing.assert_close(values[:count], wanted[:count], rtol=1e-4, atol=1e-5)
        assert update_norms(model)[path].norm == pytest.approx(float(update.norm()), rel=1e-5)


def test_a_start_that_is_subtracted_is_no_update():
    torch.manual_seed(0)
    model = inject(nn.Sequential(nn.Linear(12, 20)), lora(["0"], init_lora_weights="pissa"))
    assert update_norms(model)["0"].norm < 1e-12 and float(spectrum(model)["0"].max()) < 1e-12


def test_a_bias_in_the_update_and_a_convolution_have_factors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Linear(5, 9))
    randomize(inject(model, lora(["0", "1"], r=4, lora_bias=True)))
    for path, values in spectrum(model).items():
        assert low_rank(model[int(path)]) is not None
        close(values, torch.linalg.svdvals(model[int(path)].delta_weight().detach())[:4], 1e-4)


def test_effective_and_stable_rank():
    assert effective_rank([2.0, 2, 2, 0]) == pytest.approx(3) and stable_rank([2.0, 2, 2, 0]) == pytest.approx(3)
    assert effective_rank([5.0]) == stable_rank(torch.tensor([5.0])) == 1
    assert effective_rank([0.0, 0]) == stable_rank([0.0, 0]) == 0
    p = [0.75, 0.25]
    assert effective_rank([3.0, 1.0]) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))
    assert stable_rank([3.0, 1.0]) == pytest.approx(10 / 9)
    assert stable_rank([1e-200, 1e-200]) == pytest.approx(2) == effective_rank([1e-200, 1e-200])
    for bad in ([], [-1.0], [math.nan], [[1.0]]):
        for measure in (effective_rank, stable_rank):
            with pytest.raises(ConfigError, match="singular values"):
                measure(bad)


# ---- subspaces


def test_the_grid_is_the_formula_of_the_paper():
    model, other = mixed(), mixed()
    randomize(other, 8)
    for path, side in (("0", "A"), ("0", "B"), ("2", "B"), ("4", "A")):
        first, second = model[int(path)], other[int(path)]
        name = f"lora_{side}"
        one, two = (getattr(each, name).detach().double() for each in (first, second))
        if side == "A":
            left, right = (torch.linalg.svd(each, full_matrices=False).Vh for each in (one, two))
        else:
            left, right = (torch.linalg.svd(each, full_matrices=False).U.T for each in (one, two))
        grid = similarity_grid(first, second, side=side)
        assert grid.shape == (len(left), len(right)) and float(grid.min()) >= 0 and float(grid.max()) <= 1 + 1e-12
        for i in range(1, len(left) + 1):
            for j in range(1, len(right) + 1):
                want = float((left[:i] @ right[:j].T).square().sum()) / min(i, j)
                assert float(grid[i - 1, j - 1]) == pytest.approx(want, abs=1e-10)
                assert subspace_similarity(first, second, i, j, side=side) == float(grid[i - 1, j - 1])


def test_the_same_is_1_and_orthogonal_is_0():
    adapter = mixed()[0]
    for side in ("A", "B"):
        grid = similarity_grid(adapter, adapter, side=side)
        torch.testing.assert_close(grid, torch.ones_like(grid), rtol=0, atol=1e-10)
    eye = torch.eye(12)
    assert float(similarity_grid(eye[:3], eye[3:8]).abs().max()) == 0
    assert subspace_similarity(eye[:3], eye[:5], 3, 5) == pytest.approx(1)  # the smaller span lies in the other
    assert subspace_similarity(3 * eye[:2], 2 * eye[1:3], 2, 2) == pytest.approx(0.5)
    assert subspace_similarity(eye[:, :3], eye[:, 3:], 3, 2, side="B") == 0


def test_rounding_is_no_direction():
    factor = torch.cat([torch.eye(12)[:2], torch.zeros(2, 12)])
    factor[2] = factor[0] + factor[1]
    assert similarity_grid(factor, torch.eye(12)[:3]).shape == (2, 3)
    with pytest.raises(ConfigError, match="i=3: the factor has 2"):
        subspace_similarity(factor, factor, 3, 1)


def test_what_cannot_be_compared_is_refused():
    model = mixed()
    with pytest.raises(ConfigError, match="12 and of 20"):
        similarity_grid(model[0], model[2])
    with pytest.raises(ConfigError, match="side='C'"):
        similarity_grid(model[0], model[0], side="C")
    with pytest.raises(ConfigError, match="j=0"):
        subspace_similarity(model[0], model[0], 1, 0)
    with pytest.raises(KindError, match="Linear"):
        similarity_grid(nn.Linear(3, 4), model[0])
    fresh = inject(nn.Sequential(nn.Linear(12, 20)), lora(["0"]))[0]
    with pytest.raises(ConfigError, match="factor B is zero"):
        similarity_grid(fresh, fresh, side="B")
    assert similarity_grid(fresh, model[0]).shape == (3, 3)
    with pytest.raises(StateError, match="Whole has no factors"):
        similarity_grid(Whole(nn.Linear(12, 20), lora(["0"])), model[0])


class Whole(Adapter):
    """An update that is no product."""

    def delta_weight(self):
        return torch.ones(self.out_features, self.in_features)

    def forward(self, x):
        return self.base_layer(x) + F.linear(x, self.delta_weight())


# ---- intruders


def plant(model, layer, size):
    """Make the update one direction u v^T that is as far as can be from all left singular vectors of the weight."""
    weight = dense_weight(layer.innermost).double()
    U = torch.linalg.svd(weight).U
    u = U[:, : weight.shape[1]].sum(1) / math.sqrt(weight.shape[1])  # its cosine to each of them is 1 / sqrt(in)
    v = torch.linalg.svd(weight).Vh[0]
    with torch.no_grad():
        layer.lora_A.zero_()[0], layer.lora_B.zero_()[:, 0] = v.float(), (size / layer.scaling) * u.float()
    return 1 / math.sqrt(weight.shape[1])


@pytest.mark.parametrize("packed", [False, True])
def test_a_planted_intruder_is_found(packed):
    model = words(packed)
    cosine = plant(model, model.mid, 1000.0)
    found = intruder_dimensions(model, k=4, epsilon=0.5)["mid"]
    assert found.count == 1 and found.cosines.shape == (4,)
    assert float(found.cosines[0]) == pytest.approx(cosine, rel=1e-2)


def test_intruders_are_counted_as_the_definition_says():
    model = mixed()
    for path, found in intruder_dimensions(model, k=5, epsilon=0.7).items():
        weight = dense_weight(model[int(path)].innermost).double()
        whole = torch.linalg.svd(weight + delta(model[int(path)]), full_matrices=False).U[:, :5]
        cosines = (whole.T @ torch.linalg.svd(weight, full_matrices=False).U).abs().amax(1)
        torch.testing.assert_close(found.cosines, cosines.float(), rtol=0, atol=1e-4)
        assert found.count == int((cosines < 0.7).sum())
    assert sum(found.count for found in intruder_dimensions(model, epsilon=0.7).values()) > 0


def test_a_zero_update_has_no_intruder_and_dora_can_be_measured():
    found = intruder_dimensions(words(start="zero"))["mid"]
    assert found.count == 0 and float(found.cosines.min()) > 0.999
    assert len(intruder_dimensions(words(use_dora=True), k=3)["mid"].cosines) == 3
    for wrong in ({"k": 0}, {"epsilon": -0.1}, {"epsilon": math.nan}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            intruder_dimensions(words(), **wrong)


# ---- alignment


def gradient_of_mid(model, examples):
    """dL/dW of the middle layer of the base in fp64, by autograd on a dense copy."""
    with disabled(model):
        dense = Words().double()
        dense.load_state_dict({k: v.double() for k, v in Words().state_dict().items()})
        with torch.no_grad():
            dense.mid.weight.copy_(dense_weight(model.mid).double())
    total = 0
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logits = dense(ids, torch.ones_like(ids)).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(example.labels[1:]), ignore_index=IGNORED, reduction="sum")
    return torch.autograd.grad(total, dense.mid.weight)[0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_alignment_is_the_cosine_with_the_gradient_of_the_weight(packed, size):
    model = words(packed)
    G, update = gradient_of_mid(model, texts()), delta(model.mid)
    wanted = -float((G * update).sum() / G.norm() / update.norm())
    assert alignment(model, texts(), batch_size=size)["mid"] == pytest.approx(wanted, abs=1e-5)
    assert abs(wanted) > 1e-3


@pytest.mark.parametrize("packed", [False, True])
def test_one_step_of_descent_from_a_full_rank_start_is_aligned(packed):
    model = words(packed, start="zero", r=12, lora_alpha=30)
    with torch.no_grad():
        model.mid.lora_A.copy_(torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1))).Q)
    assert math.isnan(alignment(model, texts())["mid"])  # no update yet
    optimizer = torch.optim.SGD([model.mid.lora_A, model.mid.lora_B], lr=0.1)
    token_losses(model, collate(texts(), 0)).mean().backward()
    optimizer.step()
    assert alignment(model, texts())["mid"] == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        model.mid.lora_B.neg_()
    assert alignment(model, texts())["mid"] == pytest.approx(-1, abs=1e-5)


def test_alignment_of_several_layers_is_the_same_however_many_at_a_time(make_llama):
    model = randomize(inject(make_llama(0), lora(["q_proj", "down_proj", "lm_head"])))
    some = texts(vocabulary=64)
    one, many = alignment(model, some), alignment(model, some, layers_at_a_time=9)
    assert len(one) == 5 and one == pytest.approx(many, abs=1e-5)
    assert list(one) == list(many)


def test_alignment_under_dora_and_through_an_activation_in_place():
    assert -1 < alignment(words(use_dora=True), texts())["mid"] < 1
    model = words()
    want = alignment(model, texts())["mid"]

    def forward(input_ids, attention_mask):
        hidden = model.embed(input_ids).cumsum(1) / 4 * attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=model.head(model.mid(hidden).tanh_()))

    model.forward = forward
    assert alignment(model, texts())["mid"] == pytest.approx(want, abs=1e-6)


def test_alignment_gives_no_gradient_to_a_base_that_trains():
    model = words()
    want = alignment(model, texts())
    for parameter in (model.embed.weight, model.mid.innermost.weight, model.head.bias):
        parameter.requires_grad_(True)
    assert alignment(model, texts()) == pytest.approx(want, abs=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.embed.weight.requires_grad and model.mid.innermost.weight.requires_grad


def test_alignment_refuses_what_has_no_gradient():
    model = randomize(inject(Words().eval(), lora(["embed"])))
    with pytest.raises(TargetError, match="no linear layer"):
        alignment(model, texts())
    model = Words().eval()
    model.aside = nn.Linear(4, 6)
    with pytest.raises(StateError, match="aside: no gradient"):
        alignment(randomize(inject(model, lora(["mid", "aside"]))), texts())
    assert not any(module._forward_hooks for module in model.modules())


# ---- norms


@pytest.mark.parametrize("packed", [False, True])
def test_norms_are_those_of_the_dense_updates(packed):
    model = mixed(packed)
    for path, (norm, relative) in update_norms(model).items():
        layer = model[int(path)]
        assert norm == pytest.approx(float(delta(layer).norm()), rel=1e-6)
        assert relative == pytest.approx(norm / float(dense_weight(layer.innermost).double().norm()), rel=1e-6)
    assert update_norms(words(start="zero"))["mid"] == (0, 0)


def test_norms_form_no_update(monkeypatch):
    model = mixed()
    before, shapes, true = update_norms(model), [], torch.linalg.qr
    monkeypatch.setattr(
        torch.linalg, "qr", lambda matrix, **words: shapes.append(matrix.shape) or true(matrix, **words)
    )
    for path in ("0", "2", "4"):
        model[int(path)].delta_weight = None  # which cannot be called
    assert update_norms(model) == before
    assert shapes == [(20, 3), (12, 3), (7, 5), (20, 5), (11, 9), (7, 9)]


def test_norms_over_a_run(tmp_path):
    model = words(start="zero", lora_dropout=0.0)
    config = TrainConfig(steps=5, batch_size=2, accumulate=2, lr=0.01, clip=0.05, save_every=0, eval_every=2)
    with Norms(model) as norms:
        records = train(model, texts(), config, tmp_path / "run", 0, texts(1), watch=norms.watch, say=lambda line: None)
    logged = [record for record in records if "loss" in record]
    assert [row["step"] for row in norms.rows] == [record["step"] for record in logged] == [1, 2, 3, 4, 5]
    assert [row["layer"] for row in norms.rows] == ["mid"] * 5
    for row, record in zip(norms.rows, logged, strict=True):  # one adapted layer: its gradient is the whole gradient
        assert row["grad_norm"] == pytest.approx(min(record["grad_norm"], 0.05), rel=1e-4)
    moved = [row["update_norm"] for row in norms.rows]
    assert moved[0] > 0 and moved[-1] == update_norms(model)["mid"].norm and len(set(moved)) == 5
    file = io.StringIO()
    writer = csv.DictWriter(file, Norms.columns)
    writer.writeheader()
    writer.writerows(norms.rows)
    assert file.getvalue().splitlines()[0] == "step,layer,update_norm,relative,grad_norm"
    assert len(file.getvalue().splitlines()) == 6


def test_norms_in_a_loop_of_ones_own():
    model = mixed()
    norms = Norms(model)
    norms.record(0)
    assert [row["grad_norm"] for row in norms.rows] == [None, None, None]
    model(torch.ones(4, 12)).square().sum().backward()
    norms.record(1)
    for row in norms.rows[3:]:
        layer = model[int(row["layer"])]
        want = math.sqrt(sum(float(p.grad.double().square().sum()) for p in (layer.lora_A, layer.lora_B)))
        assert row["grad_norm"] == pytest.approx(want, rel=1e-6)
    with pytest.raises(StateError, match="with Norms"):
        norms.watch({"step": 1, "loss": 1.0})


def test_another_optimizer_and_a_closed_block_are_not_seen():
    model, other = mixed(), nn.Linear(2, 3)
    before = len(optimizers._global_optimizer_pre_hooks)
    with Norms(model) as norms:
        model(torch.ones(4, 12)).sum().backward()
        mine = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        mine.step()
        mine.zero_grad()
        other(torch.ones(1, 2)).sum().backward()
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        norms.record(1)
        assert all(row["grad_norm"] > 0 for row in norms.rows)
        norms.record(2)
        assert all(row["grad_norm"] is None for row in norms.rows[3:])
    assert len(optimizers._global_optimizer_pre_hooks) == before


# ---- the loss on a line


def loss_of(model, examples):
    return evaluate(model, examples, 8, 0)


@pytest.mark.parametrize("packed", [False, True])
def test_landscape_goes_through_both_losses(packed):
    model = words(packed)
    with disabled(model):
        base = loss_of(model, texts())
    adapted = loss_of(model, texts())
    found = landscape(model, texts(), [0, 1, 0.5])
    assert found[:2] == [(0.0, base), (1.0, adapted)] and base != adapted
    scaled = delta(model.mid) / 2
    with torch.no_grad():
        model.mid.lora_B.mul_(0.5)
    assert torch.allclose(delta(model.mid), scaled)
    assert found[2][1] == pytest.approx(loss_of(model, texts()), abs=1e-6)


@pytest.mark.parametrize("fields", [{"init_lora_weights": "pissa"}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_landscape_of_other_additive_adapters(fields):
    model = words(**fields)
    with disabled(model):
        base = loss_of(model, texts())
    assert landscape(model, texts(), [0.0, 1.0]) == [
        (0.0, pytest.approx(base, abs=1e-6)),
        (1.0, loss_of(model, texts())),
    ]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"use_dora": True}, "mid.*DoRA"),
        ({"bias": "all"}, "bias.*whole"),
        ({"modules_to_save": ["head"]}, "head.*whole"),
    ],
    ids=str,
)
def test_landscape_refuses_what_is_not_scaled(fields, said):
    with pytest.raises(StateError, match=said):
        landscape(words(**fields), texts())


def test_landscape_refuses_vera_and_steps_that_are_none():
    model = inject(Words().eval(), lora(["mid"]), variant="vera")
    with pytest.raises(StateError, match="VeRALinear has no scaling"):
        landscape(model, texts())
    for steps in ([], [math.nan], ["1"], [True]):
        with pytest.raises(ConfigError, match="steps"):
            landscape(words(), texts(), steps)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("measure", ["landscape", "forgetting", "alignment"])
def test_an_interrupt_leaves_nothing_behind(measure, error, snapshot):
    model = words(lora_alpha=7)
    model.train()
    before, scaling = snapshot(model), model.mid.scaling
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 2:
            raise error

    model.head.register_forward_pre_hook(stop)
    before = snapshot(model)
    with pytest.raises(error):
        EVERY[measure](model, "default") if measure != "alignment" else alignment(model, texts(), batch_size=1)
    assert snapshot(model) == before and model.mid.scaling == scaling and model.training and model.mid.training
    assert not adapters_of(model).is_bare and not model.mid._forward_hooks

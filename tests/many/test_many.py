"""Many adapters in one model: switched, added, combined, merged in part with a report, and exchanged under a compiled model."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minilora
from minilora import (
    MiniLoraError,
    QuantConfig,
    QuantLinear,
    delete_adapter,
    get_peft_model,
    inject,
    merge,
    quantize_model,
    save_adapter,
    set_adapter,
    unmerge,
)
from minilora.errors import CheckpointError, ConfigError, StateError
from minilora.linear.layers import compute_dtype, dense_weight
from minilora.lora.adapter import Adapter
from minilora.lora.slot import own_parameters
from minilora.lora.slots import adapters_of
from minilora.many.adapted import disabled
from minilora.many.combine import COMBINATIONS, add_weighted_adapter
from minilora.many.hotswap import hotswap_adapter
from minilora.store.load import adapter_state_dict, load_adapter
from tests.compare import close
from tests.models import LAYERS, lora

BF16 = torch.bfloat16


@pytest.fixture
def three(make_mlp, add):
    """Adapters "a" (rank 3), "b" (rank 3, rsLoRA) and "c" (rank 2, two layers); "a" is active."""
    model = make_mlp()
    add(model, "a")
    add(model, "b", use_rslora=True, lora_alpha=5)
    add(model, "c", ["first", "mid"], r=2, lora_alpha=7)
    set_adapter(model, "a")
    return model


def deltas(model, name):
    """Path to the update in float64, from the factors alone."""
    found = {}
    for path, value in adapters_of(model).named(name).items():
        config = adapters_of(model).configs[name]
        r, alpha = config.for_module(path)
        scaling = alpha / (r**0.5 if config.use_rslora else r)
        found[path] = scaling * value.lora_B.detach().double() @ value.lora_A.detach().double()
    return found


def weighted(model, names, weights):
    total = {}
    for name, weight in zip(names, weights, strict=True):
        for path, delta in deltas(model, name).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


def dense_output(make_mlp, x, updates, biases=None):
    bare = make_mlp().double()
    with torch.no_grad():
        for path, delta in updates.items():
            layer = bare.get_submodule(path)
            layer.weight += delta if isinstance(layer, nn.Linear) else delta.T
        for path, bias in (biases or {}).items():
            bare.get_submodule(path).bias.copy_(bias)
        return bare(x.double())


def record(model):
    """The model's adapters, the bytes of each included, as a plain value."""
    adapters = adapters_of(model)
    tensors = {
        (name, key): hash(tensor.detach().double().contiguous().numpy().tobytes())
        for name in adapters.configs
        for key, tensor in adapter_state_dict(model, name).items()
    }
    kept = {path: [(name, id(value)) for name, value in slot.kept.items()] for path, slot in adapters.slots.items()}
    trains = [
        p.requires_grad for slot in adapters.slots.values() for v in slot.kept.values() for p in own_parameters(v)
    ]
    names = (list(adapters.configs), dict(adapters.variants), adapters.active, adapters.merged)
    return tensors, kept, trains, names


@pytest.fixture
def unchanged(snapshot, x):
    """``with unchanged(model): ...``: the block must raise a ``MiniLoraError`` (of the kind, with the words) and change nothing."""

    @contextlib.contextmanager
    def check(model, error=MiniLoraError, match=None):
        before, known, want = snapshot(model), record(model), model(x)
        with pytest.raises(error, match=match):
            yield
        assert snapshot(model) == before and record(model) == known and torch.equal(model(x), want)

    return check


# ---- adding, switching, deleting


def test_an_added_adapter_is_kept_aside(three, add, x, snapshot):
    before, want = snapshot(three), three(x)
    inject(three, lora(["last"], init_lora_weights=False), "d", activate=False)
    assert snapshot(three) == before and torch.equal(three(x), want)
    assert not any(p.requires_grad for p in own_parameters(adapters_of(three).named("d")["last"]))
    set_adapter(three, "d")
    assert {name for name, p in three.named_parameters() if p.requires_grad} == {"last.lora_A", "last.lora_B"}


@pytest.mark.parametrize("names", [p for n in (1, 2, 3) for p in itertools.permutations("abc", n)], ids="".join)
def test_every_choice_adds_up(three, make_mlp, x, names):
    set_adapter(three, names)
    close(three(x), dense_output(make_mlp, x, weighted(three, names, [1] * len(names))))
    inside = {id(p) for p in three.parameters()}
    for name in "abc":
        own = [p for value in adapters_of(three).named(name).values() for p in own_parameters(value)]
        assert all(p.requires_grad is (name in names) and (id(p) in inside) is (name in names) for p in own)


@pytest.mark.parametrize("gone", list("abc"))
@pytest.mark.parametrize("names", ["a", "ab", "abc", "c"])
def test_deleting_leaves_the_others(three, make_mlp, x, gone, names):
    set_adapter(three, list(names))
    delete_adapter(three, gone)
    left = names.replace(gone, "") or next(name for name in "abc" if name != gone)
    assert adapters_of(three).active == tuple(left) and gone not in adapters_of(three).configs
    assert not any(gone in slot.kept for slot in adapters_of(three).slots.values())
    close(three(x), dense_output(make_mlp, x, weighted(three, left, [1] * len(left))))
    with pytest.raises(StateError, match=f"no adapter is called {gone!r}"):
        set_adapter(three, gone)
    inject(three, lora(["mid"]), gone)  # the name is free again


def test_a_deleted_adapter_gives_its_places_back(three, add, make_mlp, x):
    add(three, "only", ["last"], bias="all")
    assert any(name == "norm.bias" for name in adapters_of(three).slots)
    delete_adapter(three, "only")
    assert not any(path.endswith("bias") for path in adapters_of(three).slots)
    bare = make_mlp()
    assert torch.equal(three.norm.bias, bare.norm.bias) and not three.norm.bias.requires_grad


def test_what_cannot_be_deleted(three, unchanged, add):
    with unchanged(three, StateError, "Adapter z does not exist; there are 'a', 'b', 'c'"):
        delete_adapter(three, "z")
    merge(three, ["b"])
    with unchanged(
        three, StateError, r"Cannot delete adapter\(s\) \['b'\] while they are merged. Please unmerge them first"
    ):
        delete_adapter(three, "b")


def test_the_last_adapter_can_be_deleted_and_another_put_in(three, make_mlp, x):
    for name in ("a", "b", "c"):
        delete_adapter(three, name)
    record = adapters_of(three)
    assert not record.slots and not record.configs and record.active == ()
    assert torch.equal(three(x), make_mlp()(x)) and not any(p.requires_grad for p in three.parameters())
    with pytest.raises(StateError, match="no adapter is active"):
        merge(three)
    inject(three, lora(["mid"], init_lora_weights=False), "a")
    assert record.active == ("a",) and not torch.equal(three(x), make_mlp()(x))


def test_a_deletion_whose_successor_cannot_be_shown_is_all_or_nothing(make_mlp, add, x):
    model = make_mlp()
    add(model, "a", use_dora=True)
    add(model, "b")
    add(model, "c")
    merge(model, ["b"])
    before = record(model)
    try:
        delete_adapter(model, "c")
    except MiniLoraError:
        assert record(model) == before
    else:
        assert "c" not in adapters_of(model).configs


def test_a_frozen_active_adapter_stays_frozen_when_another_comes(make_mlp, add, tmp_path):
    saved = make_mlp()
    add(saved, "default")
    save_adapter(saved, tmp_path)
    for come in (
        lambda model: inject(model, lora(), "new", activate=False),
        lambda model: load_adapter(model, tmp_path, "new", is_trainable=True, activate=False),
        lambda model: add_weighted_adapter(model, ["default"], [0.5], "new", "cat"),
    ):
        model = make_mlp()
        load_adapter(model, tmp_path)
        come(model)
        assert not any(p.requires_grad for p in model.parameters())


def test_no_active_adapter_is_not_an_index_error(make_mlp):
    model = get_peft_model(make_mlp(), lora())
    try:
        model.set_adapter([])
    except MiniLoraError:
        return
    with contextlib.suppress(MiniLoraError):
        assert not model.active_adapter
    assert model.active_adapters == []


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"modules_to_save": ["last"], "targets": ["first"]}, {"bias": "lora_only"}], ids=str
)
def test_an_adapter_that_cannot_stand_on_what_is_merged_is_not_half_added(make_mlp, add, unchanged, tmp_path, fields):
    first = {} if "use_dora" in fields else fields
    model = make_mlp()
    add(model, "a", **first)
    save_adapter(add(make_mlp(), "default", **fields), tmp_path)
    merge(model)
    targets = fields.get("targets", LAYERS)
    with unchanged(model, StateError, "merged|copy"):
        inject(model, lora(targets, **{key: value for key, value in fields.items() if key != "targets"}), "b")
    with unchanged(model, StateError, "merged|copy"):
        load_adapter(model, tmp_path, "b")


# ---- combining


def combine(model, names, weights, kind, **fields):
    add_weighted_adapter(model, list(names), weights, "new", kind, **fields)
    return {path: value.delta_weight() for path, value in adapters_of(model).named("new").items()}


def pruned(delta, density):
    kept = torch.zeros(delta.numel(), dtype=delta.dtype)
    kept[delta.abs().flatten().topk(int(density * delta.numel())).indices] = 1
    return delta * kept.view_as(delta)


def elected(parts, weights, majority):
    stack = torch.stack(parts)
    votes = stack.sum(0) if majority == "total" else stack.sign().sum(0)
    agrees = stack.sign() == torch.where(votes >= 0, 1, -1)
    total = (stack * torch.tensor(weights, dtype=stack.dtype).view(-1, 1, 1) * agrees).sum(0)
    return total / agrees.sum(0).clamp(min=1)


@pytest.mark.parametrize(("kind", "rank"), [("cat", None), ("svd", 12)])
@pytest.mark.parametrize(
    ("names", "weights"), [("ab", [0.5, -2.0]), ("abc", [1.0, 0.25, 3]), ("bb", [1, 1]), ("c", [-1])]
)
def test_cat_and_svd_are_exactly_the_weighted_sum(three, make_mlp, x, kind, rank, names, weights):
    want = weighted(three, names, weights)
    got = combine(three, names, weights, kind, svd_rank=rank)
    assert got.keys() == want.keys()
    for path in want:
        close(got[path], want[path])
    set_adapter(three, "new")
    close(three(x), dense_output(make_mlp, x, want))


def test_svd_is_the_best_part_of_its_rank(three):
    want = weighted(three, "abc", [1, 2, -1])
    for rank in (None, 1, 5):
        got = combine(three, "abc", [1, 2, -1], "svd", svd_rank=rank)
        for path, total in want.items():
            U, S, Vh = torch.linalg.svd(total, full_matrices=False)
            r = rank or 3
            close(got[path], U[:, :r] * S[:r] @ Vh[:r], 1e-4)
        delete_adapter(three, "new")


def test_cat_has_the_sum_of_the_ranks_and_scale_one(three):
    combine(three, "abc", [1, 2, -1], "cat")
    assert adapters_of(three).configs["new"].r == 8 == adapters_of(three).configs["new"].lora_alpha
    assert all(value.scaling == 1 for value in adapters_of(three).named("new").values())


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, -2.0], [-1, -0.25]])
def test_linear_is_what_its_definition_says(three, weights):
    """A and B are summed apart, each with the root of the weight times the scaling; the sign goes with A."""
    a, b = (adapters_of(three).named(name) for name in "ab")
    got = combine(three, "ab", weights, "linear")
    for path in LAYERS:
        factors = [w * v.scaling for w, v in zip(weights, (a[path], b[path]), strict=True)]
        roots = [abs(f) ** 0.5 for f in factors]
        signed = [root if f > 0 else -root for root, f in zip(roots, factors, strict=True)]
        A = sum(s * v.lora_A.double() for s, v in zip(signed, (a[path], b[path]), strict=True))
        B = sum(s * v.lora_B.double() for s, v in zip(roots, (a[path], b[path]), strict=True))
        close(got[path], B @ A)
        assert (got[path] - weighted(three, "ab", weights)[path]).norm() > 0.1 * got[path].norm()


def test_linear_of_one_adapter_is_the_adapter(three):
    want = weighted(three, "b", [-0.5])
    for path, got in combine(three, "b", [-0.5], "linear").items():
        close(got, want[path])


@pytest.mark.parametrize("kind", ["magnitude_prune", "ties"])
@pytest.mark.parametrize("density", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_pruned_sums_of_the_factors(three, kind, density, majority):
    weights = [0.5, 2.0]
    a, b = (adapters_of(three).named(name) for name in "ab")
    got = combine(three, "ab", weights, kind, density=density, majority_sign_method=majority)
    for path in LAYERS:
        roots = [(w * v[path].scaling) ** 0.5 for w, v in zip(weights, (a, b), strict=True)]
        sums = []
        for factor in ("lora_A", "lora_B"):
            parts = [pruned(getattr(v[path], factor).detach().double(), density) for v in (a, b)]
            plain = sum(root * part for root, part in zip(roots, parts, strict=True))
            sums.append(elected(parts, roots, majority) if kind == "ties" else plain)
        close(got[path], sums[1] @ sums[0])


@pytest.mark.parametrize("kind", ["magnitude_prune_svd", "ties_svd"])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_pruned_sums_of_the_updates(three, kind, density):
    """At full rank nothing but the pruned (and elected) sum of the dense updates is left."""
    names, weights = "abc", [0.5, 2.0, -1.0]
    got = combine(three, names, weights, kind, density=density, svd_rank=20)
    each = [deltas(three, name) for name in names]
    for path in got:
        parts = [pruned(one[path], density) for one in each if path in one]
        factors = [w for w, one in zip(weights, each, strict=True) if path in one]
        plain = sum(w * part for w, part in zip(factors, parts, strict=True))
        close(got[path], elected(parts, factors, "total") if kind == "ties_svd" else plain, 1e-4)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_at_full_density_is_its_plain_form_and_is_random_below(three, kind):
    torch.manual_seed(0)
    plain = {"dare_linear": "linear", "dare_ties": "ties", "dare_linear_svd": "svd", "dare_ties_svd": "ties_svd"}[kind]
    want = combine(three, "ab", [0.5, 2.0], plain, density=1.0, svd_rank=12 if "svd" in kind else None)
    results = []
    for density in (1.0, 0.5, 0.5):
        delete_adapter(three, "new")
        results.append(combine(three, "ab", [0.5, 2.0], kind, density=density, svd_rank=12 if "svd" in kind else None))
    for path in LAYERS:
        close(results[0][path], want[path], 1e-4)
        assert not torch.allclose(results[1][path], want[path], atol=1e-2)
        assert not torch.equal(results[1][path], results[2][path])


def test_dare_is_right_on_average(three):
    """Values that survive are scaled up by 1 / density, so the mean of many draws is the sum itself."""
    torch.manual_seed(0)
    want, mean = weighted(three, "ab", [0.5, 2.0]), 0
    for _ in range(200):
        mean = mean + combine(three, "ab", [0.5, 2.0], "dare_linear_svd", density=0.5, svd_rank=12)["last"] / 200
        delete_adapter(three, "new")
    assert (mean - want["last"]).norm() < 0.15 * want["last"].norm()


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_a_combination_is_frozen_and_kept_aside(three, x, snapshot, kind):
    names, fields = ("ab", {}) if kind in ("cat", "svd", "linear") else ("ab", {"density": 0.5})
    before, want = snapshot(three), three(x)
    others = {name: adapter_state_dict(three, name) for name in "abc"}
    kept = {name: {key: t.clone() for key, t in tensors.items()} for name, tensors in others.items()}
    got = combine(three, names, [0.5, -1.0], kind, **fields)
    assert all(torch.isfinite(each).all() and each.norm() > 0 for each in got.values())
    assert snapshot(three) == before and torch.equal(three(x), want)
    assert not any(p.requires_grad for v in adapters_of(three).named("new").values() for p in own_parameters(v))
    assert all(torch.equal(others[name][key], tensor) for name in kept for key, tensor in kept[name].items())


def test_a_combination_can_be_saved_and_loaded(three, make_mlp, x, tmp_path):
    combine(three, "abc", [1, 2, -1], "cat")
    save_adapter(three, tmp_path, "new")
    set_adapter(three, "new")
    again = make_mlp()
    load_adapter(again, tmp_path)
    assert torch.equal(again(x), three(x))


def test_embeddings_are_combined_too(add, make_gpt2, ids):
    model = minilora.untie(make_gpt2())
    add(model, "a", ["wte", "c_attn"])
    add(model, "b", ["wte"], r=2, use_rslora=True)
    wte = [adapters_of(model).named(name)["transformer.wte"].delta_weight() for name in "ab"]
    for kind in ("cat", "svd"):
        got = combine(model, "ab", [0.5, -2.0], kind, svd_rank=5 if kind == "svd" else None)
        close(got["transformer.wte"], 0.5 * wte[0] - 2 * wte[1])
        delete_adapter(model, "new")


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_residual_adapters_are_summed_without_their_start_or_refused(make_mlp, add, init, kind):
    model = make_mlp()
    add(model, "a", init_lora_weights=init)
    add(model, "b")
    want = {path: 0.5 * v.delta_weight() - b for (path, v), b in zip(
        adapters_of(model).named("a").items(), deltas(model, "b").values(), strict=True)}  # fmt: skip
    before = record(model)
    try:
        got = combine(model, "ab", [0.5, -1.0], kind, svd_rank=12 if kind == "svd" else None)
    except MiniLoraError:
        assert record(model) == before
        return
    for path in want:
        close(got[path], want[path], 1e-4)


def test_a_combination_adapts_the_layers_of_its_parts_and_no_other(add, randomize):
    """A path that is the ending of another one ("head" and "inner.head") must not take that one along."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"head": nn.Linear(5, 6), "inner": nn.ModuleDict({"head": nn.Linear(6, 7)})})
    inject(model, lora("head"), "a")
    randomize(model)
    want = deltas(model, "a")
    got = combine(model, "a", [2.0], "cat")
    assert got.keys() == {"head"}
    close(got["head"], 2 * want["head"])


@pytest.mark.parametrize("kind", COMBINATIONS)
@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        (
            {"modules_to_save": ["last"], "targets": ["first", "mid"]},
            "last: one of the adapters .* trains a copy of last",
        ),
    ],
    ids=["dora", "lora_bias", "modules_to_save"],
)
def test_what_is_more_than_a_low_rank_update_is_refused(three, add, unchanged, kind, fields, match):
    add(three, "d", **fields)
    set_adapter(three, "a")
    with unchanged(three, StateError, match):
        add_weighted_adapter(three, ["a", "d"], [1, 1], "new", kind, density=0.5)


class Table(nn.Module):
    """Tokens to 5 numbers by way of 6 and 9."""

    def __init__(self):
        super().__init__()
        self.table, self.first, self.norm, self.last = (
            nn.Embedding(11, 6),
            nn.Linear(6, 9),
            nn.LayerNorm(9),
            nn.Linear(9, 5),
        )

    def forward(self, x):
        return self.last(self.norm(torch.tanh(self.first(self.table(x)))))


def table_model(*names, **fields):
    """A model with adapters of these names, their values random; a name's own fields under its name."""
    torch.manual_seed(0)
    model = Table().eval()
    for at, name in enumerate(names):
        inject(model, lora(("first",), **fields.get(name, {})), name)
        for value in adapters_of(model).named(name).values():
            with torch.no_grad():
                for parameter in own_parameters(value):
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(at)) * 0.4)
    return model


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties"])
def test_token_rows_and_biases_are_summed_as_updates(kind):
    rows = {"trainable_token_indices": {"table": [1, 4]}}, {"trainable_token_indices": {"table": [4, 7]}}
    model = table_model("a", "b", a={**rows[0], "bias": "lora_only"}, b={**rows[1], "bias": "all"})
    base = {path: slot.base for path, slot in adapters_of(model).slots.items()}
    kept = {name: adapters_of(model).named(name) for name in "ab"}
    add_weighted_adapter(
        model, ["a", "b"], [0.5, -2.0], "new", kind, svd_rank=6 if kind == "svd" else None, density=1.0
    )
    new = adapters_of(model).named("new")
    want = 0.5 * kept["a"]["table"].delta_weight() - 2 * kept["b"]["table"].delta_weight()
    close(new["table"].delta_weight(), want)
    first, norm = base["first.bias"], base["norm.bias"]
    close(new["first.bias"], first + 0.5 * (kept["a"]["first.bias"] - first) - 2 * (kept["b"]["first.bias"] - first))
    close(new["norm.bias"], norm - 2 * (kept["b"]["norm.bias"] - norm))
    set_adapter(model, "new")
    model(torch.arange(11))


def test_a_copy_that_one_of_them_trains_is_taken_over():
    model = table_model("a", "b", a={"modules_to_save": ["last"]})
    add_weighted_adapter(model, ["b", "a"], [1.0, 3.0], "new", "cat")
    kept, new = adapters_of(model).named("a")["last"], adapters_of(model).named("new")["last"]
    assert torch.equal(new.weight, kept.weight) and torch.equal(new.bias, kept.bias) and new is not kept
    assert not torch.equal(new.weight, adapters_of(model).slots["last"].base.weight) and not new.weight.requires_grad
    assert adapters_of(model).configs["new"].modules_to_save == ("last",)


def test_two_copies_of_one_module_cannot_be_combined():
    model = table_model("a", "b", a={"modules_to_save": ["last"]}, b={"modules_to_save": ["last"]})
    with pytest.raises(
        StateError, match=r"Cannot add weighted adapters if they target the same module.*last, copied by 'a' and 'b'"
    ):
        add_weighted_adapter(model, ["a", "b"], [1.0, 3.0], "new", "cat")
    assert list(adapters_of(model).configs) == ["a", "b"]


@pytest.mark.parametrize("clamp", [0.0, 0.9, 1.0])
def test_a_clamped_svd_cuts_off_what_lies_beyond_the_quantile(three, clamp):
    want = sum(adapters_of(three).named(name)["first"].delta_weight() for name in "ab")
    U, S, Vh = torch.linalg.svd(want, full_matrices=False)
    A, B = Vh[:3], U[:, :3] * S[:3]
    highest = torch.quantile(torch.cat([B.flatten(), A.flatten()]), clamp)
    low, high = -highest, highest
    add_weighted_adapter(three, ["a", "b"], [1, 1], "new", "svd", svd_clamp=clamp)
    new = adapters_of(three).named("new")["first"]
    close(new.delta_weight(), B.clamp(low, high) @ A.clamp(low, high), 1e-4)


def test_a_driver_of_the_svd_is_for_cuda(three, unchanged):
    with unchanged(three, ConfigError, "svd_driver='gesvd' is for CUDA"):
        add_weighted_adapter(three, ["a", "b"], [1, 1], "new", "svd", svd_driver="gesvd")
    for words, said in (
        ({"svd_driver": "qr"}, "svd_driver='qr'"),
        ({"svd_clamp": 2}, "svd_clamp=2"),
        ({"svd_full_matrices": 1}, "=1"),
    ):
        with unchanged(three, ConfigError, said):
            add_weighted_adapter(three, ["a", "b"], [1, 1], "new", "svd", **words)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((["a", "z"], [1, 1], "new", "cat"), StateError, "no adapter is called 'z'"),
        ((["a"], [1], "b", "cat"), StateError, "'b' already"),
        ((["a"], [1], "../b", "cat"), StateError, "adapter name"),
        ((["a", "b"], [1], "new", "cat"), ConfigError, "2 adapters and 1 weights"),
        (([], [], "new", "cat"), ConfigError, "0 adapters and 0 weights"),
        ((["a"], [float("nan")], "new", "cat"), ConfigError, "finite"),
        ((["a"], ["1"], "new", "cat"), ConfigError, "finite"),
        ((["a"], [1], "new", "tise"), ConfigError, "'tise' is not known; the closest are 'ties'"),
        ((["a", "b"], [1, 1], "new", "ties"), ConfigError, "density=None"),
        ((["a", "b"], [1, 1], "new", "ties_svd", None, 0), ConfigError, "density=0"),
        ((["a", "b"], [1, 1], "new", "dare_linear", None, 1.01), ConfigError, "density=1.01"),
        ((["a", "b"], [1, 1], "new", "magnitude_prune", None, -0.5), ConfigError, "density=-0.5"),
        ((["a", "b"], [1, 1], "new", "dare_ties", None, float("nan")), ConfigError, "density=nan"),
        ((["a", "b"], [1, 1], "new", "svd", 0), ConfigError, "svd_rank=0"),
        ((["a", "b"], [1, 1], "new", "svd", 2.5), ConfigError, "svd_rank=2.5"),
        ((["a", "b"], [1, 1], "new", "ties", None, 0.5, "most"), ConfigError, "majority_sign_method='most'"),
        ((["a", "c"], [1, 1], "new", "linear"), StateError, r"ranks \[3, 2\].*use 'cat' or 'svd'"),
        ((["a", "c"], [1, 1], "new", "ties", None, 0.5), StateError, r"ranks \[3, 2\]"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_combination_changes_nothing(three, unchanged, arguments, error, match):
    with unchanged(three, error, match):
        add_weighted_adapter(three, *arguments)


# ---- merging a part


@pytest.mark.parametrize("chosen", [["a"], ["b"], ["c"], ["c", "a"]], ids="".join)
@pytest.mark.parametrize("active", ["a", "ab", "cb"])
def test_merging_some_while_others_are_active(three, make_mlp, x, snapshot, chosen, active):
    set_adapter(three, list(active))
    before, output = snapshot(three), three(x)
    merge(three, chosen)
    together = sorted({*chosen, *active})
    want = dense_output(make_mlp, x, weighted(three, together, [1] * len(together)))
    close(three(x), want)
    for path in LAYERS:
        on_top = [name for name in active if name not in chosen and path in deltas(three, name)]
        module = three.get_submodule(path)
        assert isinstance(module, Adapter) is bool(on_top)
    with disabled(three):
        assert torch.equal(three(x), make_mlp()(x))
    unmerge(three)
    assert snapshot(three) == before and torch.equal(three(x), output)


def test_switching_on_top_of_what_is_merged(three, make_mlp, x):
    merge(three, ["a"])
    for names in ("b", "cb", "a", "ac"):
        set_adapter(three, list(names))
        together = sorted({"a", *names})
        close(three(x), dense_output(make_mlp, x, weighted(three, together, [1] * len(together))))


@pytest.mark.parametrize("order", ["merged adapter is inactive", "switched after", "biases came later", "other's bias"])
def test_biases_of_a_merged_adapter_go_with_its_weights(make_mlp, add, x, order):
    model = make_mlp()
    add(model, "with", ["first", "last"], bias="lora_only")
    add(model, "without", ["first"], r=2)
    biases = {path: adapters_of(model).named("with")[f"{path}.bias"].detach() for path in ("first", "last")}
    plain, both = (
        {
            path: v.delta_weight().double()
            for path, v in adapters_of(model).named(name).items()
            if isinstance(v, Adapter)
        }
        for name in ("without", "with")
    )
    total = {path: plain.get(path, 0) + delta for path, delta in both.items()}
    if order == "merged adapter is inactive":
        merge(model, ["with"])
    elif order == "switched after":
        set_adapter(model, "with")
        merge(model)
        set_adapter(model, "without")
    elif order == "biases came later":
        merge(model)
        set_adapter(model, "with")
    else:  # merged while the other adapter shows its biases, which then goes
        set_adapter(model, "with")
        merge(model, ["without"])
        close(model(x), dense_output(make_mlp, x, total, biases))
        set_adapter(model, "without")
        total, biases = plain, {}
    close(model(x), dense_output(make_mlp, x, total, biases))


@pytest.mark.parametrize("names", [["a", "a"], ["a", "b", "a"]], ids="".join)
def test_an_adapter_named_twice_is_merged_once_or_refused(three, make_mlp, x, names):
    try:
        merge(three, names)
    except MiniLoraError:
        assert not adapters_of(three).merged
        return
    together = sorted(set(names))
    close(three(x), dense_output(make_mlp, x, weighted(three, together, [1] * len(together))))


@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
def test_unmerging_a_part_is_bit_exact(make_mlp, add, snapshot, x, requantize, double, dtype):
    model = quantize_model(make_mlp().to(dtype), QuantConfig(double_quant=double), ["first", "mid"])
    add(model, "a")
    add(model, "b", ["first", "last"], r=2)
    set_adapter(model, ["b", "a"])
    before, want = snapshot(model), model(x.to(dtype))
    for _ in range(3):
        merge(model, ["b"], requantize=requantize)
        assert snapshot(model) != before
        unmerge(model)
    assert snapshot(model) == before and torch.equal(model(x.to(dtype)), want)


# ---- the report


def survived(base, update, merged):
    """One minus the relative error of what was really added, in float64 but for the fp32 that merging works in."""
    error = merged.double() - base.double() - update
    return max(0.0, 1 - (error.norm() / update.norm()).item())


def test_fp32_keeps_all_of_the_update(three):
    set_adapter(three, ["a", "c"])
    report = merge(three)
    assert report.layers.keys() == set(LAYERS) and report.into == "float32"
    assert all(value > 0.99999 for value in report.layers.values()) and report.survived > 0.99999
    assert "3 layers as float32: 100.0% of the update survives" in str(report)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1.0, 0.01, 1e-3])
def test_the_report_is_what_rounding_left(make_mlp, add, dtype, size):
    model = make_mlp().to(dtype)
    add(model, "a")
    with torch.no_grad():
        for value in adapters_of(model).named("a").values():
            value.lora_B.mul_(size)
    base = {path: dense_weight(adapters_of(model).slots[path].base) for path in LAYERS}
    update = deltas(model, "a")
    report = merge(model)
    merged = {path: (base[path].float() + update[path].float()).to(dtype) for path in LAYERS}
    for path in LAYERS:
        assert torch.equal(dense_weight(model.get_submodule(path)), merged[path])
        assert report.layers[path] == pytest.approx(survived(base[path], update[path], merged[path]), abs=1e-3)
    errors = sum((merged[p].double() - base[p].double() - update[p]).square().sum() for p in LAYERS)
    whole = 1 - (errors / sum(update[p].square().sum() for p in LAYERS)).sqrt().item()
    assert report.survived == pytest.approx(max(0.0, whole), abs=1e-3)
    assert report.into == str(dtype).removeprefix("torch.")
    least = min(report.layers, key=report.layers.get)
    assert f"least in {least}: {report.layers[least]:.1%}" in str(report)
    bounds = {1.0: (0.95, 1.0), 0.01: (0.5, 0.999), 1e-3: (0.0, 0.99)}[size]
    assert bounds[0] <= report.survived <= bounds[1], "a smaller update loses more"
    assert dtype != BF16 or size == 1 or report.survived < 0.99


def test_an_update_of_zero_survives_whole(make_mlp):
    report = merge(inject(make_mlp().to(BF16), lora()))
    assert set(report.layers.values()) == {1.0} and report.survived == 1.0


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_requantizing_keeps_the_format_and_tells_what_it_costs(make_mlp, add, double, dtype):
    model = quantize_model(make_mlp().to(dtype), QuantConfig(blocksize=32, double_quant=double), ["first", "mid"])
    add(model, "a")
    with torch.no_grad():
        for value in adapters_of(model).named("a").values():
            value.lora_B.mul_(0.01)
    base = {path: adapters_of(model).slots[path].base for path in LAYERS}
    update = deltas(model, "a")
    dense = merge(model)
    assert not any(isinstance(model.get_submodule(path), QuantLinear) for path in LAYERS)
    assert all(compute_dtype(model.get_submodule(path)) == dtype for path in LAYERS)
    unmerge(model)
    report = merge(model, requantize=True)
    for path in ("first", "mid"):
        layer = model.get_submodule(path)
        assert isinstance(layer, QuantLinear) and layer is not base[path]
        assert (layer.format, layer.blocksize, layer.double_quant, layer.dtype) == ("nf4", 32, double, dtype)
        assert torch.equal(layer.bias, base[path].bias) and not any(p.requires_grad for p in layer.parameters())
        got = survived(dense_weight(base[path]), update[path], dense_weight(layer))
        assert report.layers[path] == pytest.approx(got, abs=1e-3)
        assert report.layers[path] < 0.6 and report.layers[path] < dense.layers[path]
    assert report.layers["last"] == dense.layers["last"] and report.survived < dense.survived
    assert "nf4" in report.into and str(dtype).removeprefix("torch.") in report.into


@pytest.mark.parametrize("spoil", ["weight", "bias"])
def test_a_merge_that_overflows_names_the_layer_and_changes_nothing(make_mlp, add, snapshot, spoil):
    model = make_mlp().half()
    add(model, "a", lora_bias=spoil == "bias")
    with torch.no_grad():
        (model.last.lora_bias if spoil == "bias" else model.last.lora_B).fill_(1e5)
    before, known = snapshot(model), record(model)
    with pytest.raises(StateError, match=r"^last: .*overflows torch\.float16"):
        merge(model)
    assert snapshot(model) == before and record(model) == known
    merge(set_others(model), ["b"])


def set_others(model):
    """After the failure the model works on: another adapter can be merged."""
    inject(model, lora(["first"]), "b")
    return model


def test_a_shared_weight_is_refused_naming_untie(make_gpt2, ids, add, snapshot):
    model = make_gpt2()
    add(model, "default", ["c_attn", "lm_head"])
    before, want = snapshot(model), model(ids).logits
    with pytest.raises(StateError, match=r"lm_head shares its weight with transformer\.wte.*minilora\.untie\(model\)"):
        merge(model)
    assert snapshot(model) == before and torch.equal(model(ids).logits, want)
    minilora.untie(model)
    merge(model)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)


def test_dora_over_what_is_merged_is_refused_and_merged_together_is_not(make_mlp, add, unchanged, x):
    model = make_mlp()
    add(model, "a", ["first"])
    add(model, "d", use_dora=True)
    set_adapter(model, ["a", "d"])
    want = model(x)
    with unchanged(model, StateError, "first: adapter 'd' reads the base weight, in which 'a' is merged"):
        merge(model, ["a"])
    merge(model)
    close(model(x), want)
    unmerge(model)
    merge(model, ["d"])  # the other way round is a sum
    close(model(x), want)


# ---- hotswap


def counting_backend():
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    return graphs, backend


@pytest.fixture
def saved(make_mlp, add, tmp_path):
    """``saved(name, targets, **fields)``: a folder with an adapter, and the model that wrote it."""

    def write(name, targets=LAYERS, variant=None, **fields):
        model = make_mlp()
        add(model, name, targets, variant, **fields)
        save_adapter(model, tmp_path / name, name)
        return tmp_path / name, model

    return write


def test_a_compiled_model_is_not_compiled_again(make_mlp, add, saved, x):
    torch._dynamo.reset()
    model = make_mlp()
    add(model, "default", r=4, lora_alpha=12)
    folders = [saved("p", r=4, lora_alpha=12), saved("q", r=2, lora_alpha=5), saved("s", r=3, use_rslora=True),
               saved("t", ["mid"], r=1, lora_alpha=7)]  # fmt: skip
    graphs, backend = counting_backend()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        close(compiled(x), model(x))
        assert len(graphs) == 1
        for folder, source in folders:
            hotswap_adapter(model, folder)
            close(compiled(x), source(x))
    assert len(graphs) == 1, "the exchange made it compile again"
    torch._dynamo.reset()


@pytest.mark.parametrize("fields", [{"r": 4}, {"r": 1, "lora_alpha": 7}, {"r": 2, "use_rslora": True}, {
    "r": 3, "alpha_pattern": {"mid": 31}, "rank_pattern": {"last": 2}}], ids=str)  # fmt: skip
def test_ranks_are_filled_up_and_scalings_folded_in(make_mlp, add, saved, x, fields):
    model = make_mlp()
    add(model, "default", r=4, lora_alpha=10)
    folder, source = saved("new", **fields)
    before = {
        path: (id(v.lora_A), id(v.lora_B), v.scaling, v.r) for path, v in adapters_of(model).named("default").items()
    }
    hotswap_adapter(model, folder)
    now = {
        path: (id(v.lora_A), id(v.lora_B), v.scaling, v.r) for path, v in adapters_of(model).named("default").items()
    }
    assert now == before
    for path, delta in deltas(source, "new").items():
        close(model.get_submodule(path).delta_weight(), delta, 1e-6)
    close(model(x), source(x))
    assert all(p.requires_grad for v in adapters_of(model).named("default").values() for p in own_parameters(v))


@pytest.mark.parametrize(
    ("variant", "present", "incoming"),
    [
        ("lora", {}, {"targets": ["first"]}),
        ("dora", {}, {}),
        ("dora", {}, {"r": 2, "lora_alpha": 5}),
        ("dora", {}, {"targets": ["first"]}),
        ("pissa", {}, {}),
        ("pissa", {}, {"lora_alpha": 5}),
        ("pissa", {}, {"r": 2}),
        ("pissa", {}, {"targets": ["first"]}),
        ("olora", {}, {}),
        ("olora", {}, {"lora_alpha": 5}),
        ("olora", {}, {"r": 2}),
        ("orthogonal", {"r": 4}, {"r": 2, "lora_alpha": 5}),
        ("lora_fa", {}, {"r": 2, "lora_alpha": 5}),
        ("lora", {"lora_bias": True}, {"lora_bias": True, "r": 2, "lora_alpha": 5}),
        ("lora", {"lora_bias": True}, {"lora_bias": True, "targets": ["first"]}),
        ("lora", {"bias": "lora_only"}, {}),
        ("lora", {"modules_to_save": ["last"], "targets": ["first"]}, {"targets": ["first"]}),
    ],
    ids=str,
)  # fmt: skip
def test_an_exchange_is_exact_or_refused(make_mlp, add, saved, x, variant, present, incoming):
    """Whatever the variant: afterwards the model is the one that wrote the folder, or nothing has changed."""
    model = make_mlp()
    add(model, "default", variant=variant, **present)
    folder, source = saved("new", variant=variant, **incoming)
    want, before = model(x), record(model)
    try:
        hotswap_adapter(model, folder)
    except MiniLoraError:
        assert torch.equal(model(x), want) and record(model) == before
        assert variant != "lora" or present, "plain LoRA can be exchanged"
        return
    close(model(x), source(x))


@pytest.mark.parametrize("merged", [["default"], ["default", "other"]], ids=len)
def test_exchanging_what_is_merged_is_seen_or_refused(make_mlp, add, saved, x, merged):
    model = make_mlp()
    add(model, "other", ["mid"])
    with torch.no_grad():
        model.mid.lora_B.zero_()
    add(model, "default")
    folder, source = saved("new")
    merge(model, merged)
    want, before = model(x), record(model)
    try:
        hotswap_adapter(model, folder)
    except MiniLoraError:
        assert torch.equal(model(x), want) and record(model) == before
        return
    close(model(x), source(x))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"r": 4}, "first has rank 4, the present adapter 3; start from the largest rank"),
        ({"use_dora": True}, "as DoRALinear, adapter 'default' has LoRALinear"),
        ({"init_lora_weights": "pissa"}, "as PiSSALinear"),
        ({"variant": "vera"}, "as VeRALinear"),
        ({"lora_bias": True}, "differs in lora_bias"),
        ({"bias": "lora_only"}, "adapts first.bias as Parameter"),
        ({"modules_to_save": ["norm"]}, "adapts norm as LayerNorm"),
        ({"targets": ["first", "mid", "last"]}, "adapts last as LoRALinear, adapter 'default' has NoneType"),
    ],
    ids=str,
)
def test_what_cannot_be_exchanged_leaves_every_bit(make_mlp, add, saved, unchanged, fields, match):
    model = make_mlp()
    add(model, "default", ["first", "mid"])
    folder, _ = saved("new", **{"targets": ["first", "mid"], **fields})
    generator = torch.get_rng_state()
    with unchanged(model, CheckpointError, match):
        hotswap_adapter(model, folder)
    assert torch.equal(torch.get_rng_state(), generator)


def test_an_exchange_with_nobody_or_nothing(make_mlp, add, saved, unchanged, tmp_path):
    model = make_mlp()
    add(model, "default")
    folder, _ = saved("new")
    with unchanged(model, StateError, "no adapter is called 'z'"):
        hotswap_adapter(model, folder, "z")
    with unchanged(model, CheckpointError, "no such folder"):
        hotswap_adapter(model, tmp_path / "nowhere")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with unchanged(model, CheckpointError, "is not the file that was saved here"):
        hotswap_adapter(model, folder)
    (folder / "minilora.json").unlink()
    with unchanged(model, CheckpointError, "damaged"):
        hotswap_adapter(model, folder)


@pytest.mark.parametrize("active", [["default"], ["other", "default"], ["other"]], ids="+".join)
def test_an_exchange_among_several(make_mlp, add, saved, x, active):
    model = make_mlp()
    add(model, "other", ["first", "last"], r=2)
    add(model, "default")
    set_adapter(model, active)
    folder, source = saved("new", ["first", "mid"], r=2, lora_alpha=5)
    hotswap_adapter(model, folder)
    want = deltas(source, "new") if "default" in active else {}
    if "other" in active:
        for path, delta in deltas(model, "other").items():
            want[path] = want.get(path, 0) + delta
    close(model(x), dense_output(make_mlp, x, want))
    assert adapters_of(model).active == tuple(active)


def test_the_helpers_of_this_file_see_a_change(three, x):
    before = record(three)
    with torch.no_grad():
        three.first.lora_A[0, 0] += 1e-3
    assert record(three) != before
    assert F.mse_loss(three(x), three(x)).item() == 0

"""Several adapters in one model, as in PEFT: combined, switched, merged by name, mixed by row, exchanged, defaulted."""

import copy
import random

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers
from peft.utils.hotswap import hotswap_adapter

import minilora
from minilora.report.inspect import adapters_in
from tests.models import adapted_paths, llama

# PEFT reads the orientation of a layer from its config and says so when it has to correct the config.
CONV1D = "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"
# PEFT has another object for each adapter's config, and asks for the merge state on every call.
UNMERGED = "ignore:Already unmerged. Nothing to do:UserWarning"
MERGED = "ignore:Adapter cannot be set when the model is merged. Unmerging the model first:UserWarning"
DELETED = "ignore:Adapter .* was active which is now deleted:UserWarning"
pytestmark = [pytest.mark.filterwarnings(text) for text in (CONV1D, UNMERGED, MERGED, DELETED)]

PREFIX = "base_model.model."
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
OTHERS = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}
POOL = [
    "one",
    "two",
    "three",
    "four",
    "five",
]  # the names of adapters; no part of a module's name, over which PEFT stumbles
both_families = pytest.mark.parametrize("family", ["llama", "gpt2"])


def add(library, model, name, fields, seed):
    """A new adapter, active in a model without one and kept aside in a model that has some."""
    config = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **copy.deepcopy(fields)}
    torch.manual_seed(seed)
    if hasattr(model, "peft_config"):
        model.add_adapter(name, library.LoraConfig(**config))
        return model
    return library.get_peft_model(model, library.LoraConfig(**config), adapter_name=name)


def trainable(model, name):
    """What trains, by the name that an adapter file has for it; ``name`` is the active adapter."""
    found = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = key.removeprefix(PREFIX).replace(f".{name}", "").removesuffix(".weight")
            found[key] = parameter
    return found


def disturb(model, name):
    """Make ``name`` active and move its values by noise that depends on it and on the parameters' names only."""
    model.set_adapter(name)
    with torch.no_grad():
        for key, parameter in trainable(model, name).items():
            generator = torch.Generator().manual_seed(sum(map(ord, key + name)))
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def assert_same_logits(found, wanted, tolerance=1e-6):
    """Equal within 1e-6 of the largest logit."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1.0, wanted.abs().max().item()))


def updates(model, name):
    """Path to the dense update ``[out, in]`` of adapter ``name``, from either library's model."""
    if isinstance(model, minilora.PeftModel):
        with torch.no_grad():
            return {path: value.delta_weight() for path, value in adapters_in(model, name).items()}
    found = {}
    for path, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight") and (name in layer.lora_A or name in layer.lora_embedding_A):
            delta = layer.get_delta_weight(name).detach()
            found[path.removeprefix(PREFIX)] = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
    return found


def assert_same_updates(found, wanted, tolerance=1e-6):
    assert found.keys() == wanted.keys() and wanted
    for path in wanted:
        told = {"msg": lambda text, path=path: f"{path}: {text}"}
        torch.testing.assert_close(found[path], wanted[path], rtol=0, atol=tolerance, **told)


@pytest.fixture
def models(build_model):
    """``models(family, fields of the first, of the second, ...)``: both libraries' models with adapters a, b, ..."""

    def make(family, *adapters):
        made = []
        for library in (minilora, peft):
            model = build_model(family, tied=False).eval()
            for seed, (name, fields) in enumerate(zip(POOL, adapters, strict=False)):
                model = add(library, model, name, fields, seed)
                disturb(model, name)
            model.set_adapter("one")
            made.append(model.eval())
        return made

    return make


@pytest.fixture
def three(models):
    """Three adapters of equal rank, alphas apart, the second on other layers."""

    def make(family):
        return models(
            family,
            {"target_modules": TARGETS[family]},
            {"target_modules": OTHERS[family], "lora_alpha": 6},
            {"target_modules": TARGETS[family], "lora_alpha": 20},
        )

    return make


# Weighted sums

PRUNING = ["ties", "dare_linear", "dare_ties", "magnitude_prune"]
COMBINATIONS = ["cat", "svd", "linear", *PRUNING, *(f"{name}_svd" for name in PRUNING)]
WEIGHTS = {"positive": [0.5, 1.5, 0.7], "one negative": [1.0, -0.8, 0.4], "sum of one": [0.2, 0.3, 0.5]}


def combine(models, names, weights, combination, **more):
    """The new adapter ``new`` in each model, its update by path; drawn from the same state of the generator."""
    found = []
    for model in models:
        torch.manual_seed(21)
        model.add_weighted_adapter(names, weights, "new", combination, **more)
        found.append(updates(model, "new"))
    return found


def density_of(combination):
    return {} if combination in ("cat", "svd", "linear") else {"density": 0.4}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("combination", COMBINATIONS)
def test_weighted_adapter_has_the_updates_of_peft(three, combination, weights):
    found, wanted = combine(three("llama"), ["one", "two", "three"], weights, combination, **density_of(combination))
    assert_same_updates(found, wanted, 3e-6)
    assert all(delta.abs().max() > 1e-3 for delta in wanted.values())


# With Conv1D, PEFT prunes the transposed update at random: other values fall out of it under one seed.
@pytest.mark.parametrize(
    "combination", [name for name in COMBINATIONS if name not in ("dare_linear_svd", "dare_ties_svd")]
)
def test_weighted_adapter_on_conv1d_has_the_updates_of_peft(three, combination):
    found, wanted = combine(
        three("gpt2"), ["one", "two", "three"], [0.5, -1.5, 0.7], combination, **density_of(combination)
    )
    assert_same_updates(found, wanted, 3e-6)


@pytest.mark.parametrize("combination", ["dare_linear_svd", "dare_ties_svd"])
def test_random_pruning_on_conv1d_keeps_the_mean_of_peft(three, combination):
    """Not the same values under one seed, but as many of them, scaled up alike."""
    found, wanted = combine(three("gpt2"), ["one", "three"], [1.0, 1.0], combination, density=0.5, svd_rank=16)
    for path, delta in wanted.items():
        assert found[path].norm() == pytest.approx(delta.norm(), rel=0.25)
        kept = [(each[path].abs() > 1e-5).float().mean().item() for each in (found, wanted)]
        assert kept[0] == pytest.approx(kept[1], abs=0.08) and kept[0] < 0.9


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("combination", ["ties", "dare_ties", "ties_svd", "dare_ties_svd"])
def test_majority_of_signs_is_counted_as_in_peft(three, combination, method):
    both = three("llama")
    more = {"density": 0.7, "majority_sign_method": method}
    found, wanted = combine(both, ["one", "two", "three"], [1.0, 1.0, 0.5], combination, **more)
    assert_same_updates(found, wanted, 3e-6)


@pytest.mark.parametrize("density", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("combination", PRUNING)
def test_density_prunes_as_in_peft(three, combination, density):
    found, wanted = combine(three("llama"), ["one", "three"], [1.0, 0.5], combination, density=density)
    assert_same_updates(found, wanted, 3e-6)


@pytest.mark.parametrize("svd_rank", [None, 1, 3, 8, 30])
def test_svd_rank_is_that_of_peft(three, svd_rank):
    both = three("llama")
    found, wanted = combine(both, ["one", "two", "three"], [1.0, 0.5, 0.25], "svd", svd_rank=svd_rank)
    assert_same_updates(found, wanted, 3e-6)
    assert [model.peft_config["new"].r for model in both] == [svd_rank or 4] * 2
    assert [model.peft_config["new"].lora_alpha for model in both] == [svd_rank or 4] * 2


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_adapters_of_different_ranks_combine_as_in_peft(models, combination):
    both = models(
        "llama",
        {"target_modules": TARGETS["llama"], "r": 2, "lora_alpha": 7},
        {"target_modules": OTHERS["llama"], "r": 6, "lora_alpha": 3},
    )
    found, wanted = combine(both, ["one", "two"], [0.3, 2.0], combination)
    assert_same_updates(found, wanted, 3e-6)


def test_linear_refuses_different_ranks_as_peft_does(models):
    for model in models("llama", {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"], "r": 2}):
        with pytest.raises((ValueError, RuntimeError)):
            model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "new", "linear")
        assert set(model.peft_config) == {"one", "two"}


@both_families
@pytest.mark.parametrize(("combination", "more"), [("cat", {}), ("svd", {"svd_rank": 8})])
def test_exact_combinations_are_the_weighted_sum(three, family, combination, more):
    ours, _ = three(family)
    parts = [updates(ours, name) for name in ("one", "three")]
    ours.add_weighted_adapter(["one", "three"], [0.5, -0.5], "new", combination, **more)
    expected = {path: 0.5 * parts[0][path] - 0.5 * parts[1][path] for path in parts[0]}
    assert_same_updates(updates(ours, "new"), expected, 3e-6)


@pytest.mark.parametrize("combination", ["cat", "svd", "linear", "ties", "magnitude_prune_svd"])
def test_embeddings_combine_as_in_peft(models, combination):
    fields = {"target_modules": ["embed_tokens", "q_proj"]}
    both = models("llama", fields, {**fields, "lora_alpha": 6})
    found, wanted = combine(both, ["one", "two"], [1.0, 0.5], combination, **density_of(combination))
    assert_same_updates(found, wanted, 1e-5)


@both_families
@pytest.mark.parametrize("combination", ["cat", "svd", "linear"])
def test_weighted_adapter_is_kept_aside_and_gives_the_logits_of_peft(three, token_ids, family, combination):
    results = []
    for model in three(family):
        before = logits(model, token_ids)
        model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "new", combination)
        assert torch.equal(logits(model, token_ids), before)
        model.set_adapter("new")
        results.append(logits(model, token_ids))
        assert not torch.equal(results[-1], before)
    assert_same_logits(*results)


@pytest.mark.parametrize("combination", ["cat", "svd", "ties"])
def test_file_of_a_weighted_adapter_gives_the_same_logits_in_peft(three, build_model, token_ids, tmp_path, combination):
    ours, _ = three("llama")
    ours.add_weighted_adapter(["one", "two", "three"], [0.7, 0.4, -0.2], "new", combination, **density_of(combination))
    ours.set_adapter("new")
    ours.save_pretrained(tmp_path, selected_adapters=["new"])
    loaded = peft.PeftModel.from_pretrained(build_model("llama", tied=False), tmp_path / "new")
    assert_same_logits(logits(loaded, token_ids), logits(ours, token_ids))


# Folders with several adapters


@both_families
def test_folders_of_peft_load_one_by_one(three, build_model, token_ids, tmp_path, family):
    _, theirs = three(family)
    theirs.save_pretrained(tmp_path)
    ours = minilora.PeftModel.from_pretrained(build_model(family, tied=False), tmp_path / "one", adapter_name="one")
    ours.load_adapter(tmp_path / "two", "two")
    ours.load_adapter(tmp_path / "three", "three")
    seen = []
    for name in ["two", "three", "one"]:
        ours.set_adapter(name)
        theirs.set_adapter(name)
        seen.append(logits(ours, token_ids))
        assert_same_logits(seen[-1], logits(theirs, token_ids))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@both_families
def test_folders_of_minilora_load_one_by_one_in_peft(three, build_model, token_ids, tmp_path, family):
    ours, _ = three(family)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(build_model(family, tied=False), tmp_path / "one", adapter_name="one")
    for name in ["two", "three"]:
        result = theirs.load_adapter(tmp_path / name, name)
        assert not result.unexpected_keys
    for name in ["two", "three", "one"]:
        ours.set_adapter(name)
        theirs.set_adapter(name)
        assert_same_logits(logits(ours, token_ids), logits(theirs, token_ids))


@both_families
def test_folders_have_the_same_files(three, tmp_path, family):
    listed = []
    for name, model in zip(("ours", "theirs"), three(family), strict=True):
        model.save_pretrained(tmp_path / name)
        files = {str(file.relative_to(tmp_path / name)) for file in (tmp_path / name).rglob("*") if file.is_file()}
        listed.append({file for file in files if not file.endswith(("README.md", "minilora.json"))})
    assert listed[0] == listed[1]
    assert len(listed[0]) == 6


def test_selected_adapters_are_saved_as_in_peft(three, tmp_path):
    for name, model in zip(("ours", "theirs"), three("llama"), strict=True):
        model.save_pretrained(tmp_path / name, selected_adapters=["three"])
        assert {file.parent.name for file in (tmp_path / name).rglob("*.safetensors")} == {"three"}


# Switching


def sequence(seed, steps=15):
    """A random sequence of operations on named adapters, valid in both libraries: at least one adapter always stays."""
    draw, present, fresh = random.Random(seed), ["one"], 100
    for number in range(steps):
        free = [name for name in POOL if name not in present]
        choices = ["set", "set", "disable", "several"] + ["add"] * (2 * bool(free)) + ["delete"] * (len(present) > 1)
        what = "add" if number < 2 else draw.choice(choices)
        if what == "add":
            name, fresh = draw.choice(free), fresh + 1
            present.append(name)
            fields = {"r": draw.choice([2, 4, 6]), "lora_alpha": draw.choice([3, 7, 10])}
            yield what, name, {**fields, "which": draw.choice(["TARGETS", "OTHERS"]), "seed": fresh}
        elif what == "delete":
            name = draw.choice(present)
            present.remove(name)
            yield what, name, {}
        elif what == "several":
            yield what, draw.sample(present, min(len(present), 2)), {}
        else:
            yield what, draw.choice(present), {}


def apply(library, model, family, step):
    what, name, more = step
    if what == "add":
        more = dict(more)
        targets = {"TARGETS": TARGETS, "OTHERS": OTHERS}[more.pop("which")][family]
        seed, active = more.pop("seed"), list(model.active_adapters)
        add(library, model, name, {"target_modules": targets, "init_lora_weights": False, **more}, seed)
        assert list(model.active_adapters) == active
    elif what == "delete":
        model.delete_adapter(name)
        if library is peft:  # its layers may each have made another one active than the one that it reports
            model.base_model.set_adapter(list(model.active_adapters))
    elif what in ("set", "several"):
        (model if library is minilora else model.base_model).set_adapter(name)


@both_families
@pytest.mark.parametrize("seed", range(6))
def test_random_sequences_of_operations_give_the_logits_of_peft(models, token_ids, family, seed):
    ours, theirs = models(family, {"target_modules": TARGETS[family]})
    seen, done = set(), []
    for step in sequence(seed):
        done.append(step[:2])
        for library, model in ((minilora, ours), (peft, theirs)):
            apply(library, model, family, step)
        assert list(ours.peft_config) == list(theirs.peft_config), done
        assert set(ours.active_adapters) == set(theirs.active_adapters), done
        if step[0] == "disable":
            with ours.disable_adapter(), theirs.disable_adapter():
                assert_same_logits(logits(ours, token_ids), logits(theirs, token_ids))
        found = logits(ours, token_ids)
        assert_same_logits(found, logits(theirs, token_ids), 3e-6)
        seen.add(round(found.double().sum().item(), 6))
    assert len(seen) > 3, "the sequence changes nothing"


@both_families
@pytest.mark.parametrize("seed", range(3))
def test_random_sequences_train_the_parameters_that_peft_trains(models, family, seed):
    ours, theirs = models(family, {"target_modules": TARGETS[family]})
    for step in sequence(50 + seed):
        for library, model in ((minilora, ours), (peft, theirs)):
            apply(library, model, family, step)
        counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
        if step[0] in ("set", "several"):
            assert counts[0] == counts[1] > 0, step


def test_deleting_the_active_adapter_activates_the_one_that_peft_activates(three):
    both = three("llama")
    for model in both:
        model.set_adapter("two")
        model.delete_adapter("two")
    assert both[0].active_adapters == list(both[1].active_adapters) == ["one"]


def test_a_taken_name_and_an_unknown_one_are_refused_as_in_peft(three):
    for library, model in zip((minilora, peft), three("llama"), strict=True):
        with pytest.raises((ValueError, RuntimeError)):
            add(library, model, "two", {"target_modules": ["q_proj"]}, 0)
        for call in (model.set_adapter, model.delete_adapter):
            with pytest.raises((ValueError, RuntimeError, KeyError)):
                call("nobody")
        assert set(model.peft_config) == {"one", "two", "three"}


# Merging by name


@both_families
@pytest.mark.parametrize("names", [["one"], ["two"], ["three", "one"], ["one", "two", "three"]])
def test_merging_named_adapters_gives_the_weights_of_peft(three, family, names):
    ours, theirs = (model.merge_and_unload(adapter_names=names).state_dict() for model in three(family))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-6, msg=key)


@both_families
def test_merging_in_place_and_back_gives_the_logits_of_peft(three, token_ids, family):
    ours, theirs = three(family)
    before = logits(ours, token_ids)
    for names in (["one"], None):
        for model in (ours, theirs):
            model.merge_adapter(names)
        assert_same_logits(logits(ours, token_ids), logits(theirs, token_ids))
        assert_same_logits(logits(ours, token_ids), before, 5e-6)
        # What a server is given meanwhile (TRL writes these into vLLM) has the update in it.
        found, wanted = (dict(model.named_parameters()) for model in (ours, theirs))
        assert found.keys() == wanted.keys() and found.keys() <= ours.state_dict().keys()
        for name, parameter in wanted.items():
            torch.testing.assert_close(found[name], parameter, atol=1e-5, rtol=0, msg=name)
            assert torch.equal(ours.state_dict()[name], found[name]), name
        for model in (ours, theirs):
            model.unmerge_adapter()
    assert torch.equal(logits(ours, token_ids), before)
    assert_same_logits(logits(theirs, token_ids), before)


@both_families
def test_merging_an_inactive_adapter_alone_gives_the_logits_of_peft(three, token_ids, family):
    ours, theirs = three(family)
    for model in (ours, theirs):
        model.set_adapter("two")
        model.merge_adapter(["two"])
    assert_same_logits(logits(ours, token_ids), logits(theirs, token_ids))


WHILE_MERGED = {
    "token rows": ({}, {"trainable_token_indices": [3, 5]}),
    "token rows and a copy": ({}, {"trainable_token_indices": [3, 5], "modules_to_save": ["lm_head"]}),
    "an embedding": ({}, {"target_modules": ["v_proj", "embed_tokens"]}),
    "biases": ({"attention_bias": True}, {"bias": "all"}),
    "DoRA": ({}, {"use_dora": True}),
}


@pytest.mark.parametrize("case", WHILE_MERGED)
def test_while_merged_every_name_has_the_value_of_peft(case):
    """TRL sends what these names show to vLLM, but for what is called original_module."""
    sizes, fields = WHILE_MERGED[case]
    shown = []
    for library in (minilora, peft):
        config = {"r": 2, "lora_alpha": 6, "target_modules": ["v_proj"], **copy.deepcopy(fields)}
        model = library.get_peft_model(llama(**sizes), library.LoraConfig(**config))
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name in sorted(trained):
                trained[name].copy_(torch.randn(trained[name].shape, generator=generator) * 0.3)
        for merge in (False, True):
            if merge:
                model.merge_adapter()
            both = (model.named_parameters(), model.state_dict().items())
            shown.append([{name: value.detach().clone() for name, value in each} for each in both])
    ours, theirs = shown[:2], shown[2:]
    for found, wanted in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5, msg=name)
    moved = [name for name, value in ours[0][0].items() if not torch.equal(value, ours[1][0][name])]
    assert moved and all("base_layer" in name for name in moved)


def test_deleting_a_merged_adapter_is_refused_as_in_peft(three):
    for model in three("llama"):
        model.merge_adapter(["one"])
        with pytest.raises((ValueError, RuntimeError), match="merge"):
            model.delete_adapter("one")


# A different adapter for every row

ROWS = ["one", "two", "__base__", "three", "one", "__base__", "two"]


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, 64, (len(ROWS), 9), generator=torch.Generator().manual_seed(8))


@both_families
def test_rows_with_different_adapters_have_the_logits_of_peft(three, rows, family):
    ours, theirs = three(family)
    found = logits(ours, rows, adapter_names=ROWS)
    assert_same_logits(found, logits(theirs, rows, adapter_names=ROWS))
    assert_same_logits(found[:1], logits(ours, rows[:1]))


@both_families
@pytest.mark.parametrize("name", ["one", "two", "three", "__base__"])
def test_rows_are_those_of_the_adapter_alone(three, rows, family, name):
    ours, theirs = three(family)
    own = [place for place, row in enumerate(ROWS) if row == name]
    found = logits(ours, rows, adapter_names=ROWS)[own]
    if name == "__base__":
        with theirs.disable_adapter():
            expected = logits(theirs, rows[own])
    else:
        theirs.set_adapter(name)
        expected = logits(theirs, rows[own])
    assert_same_logits(found, expected)


@both_families
@pytest.mark.parametrize(
    "names", [["__base__"] * 7, ["three"] * 7, ["two", "two", "two", "__base__", "one", "one", "one"]]
)
def test_uniform_batches_have_the_logits_of_peft(three, rows, family, names):
    ours, theirs = three(family)
    assert_same_logits(logits(ours, rows, adapter_names=names), logits(theirs, rows, adapter_names=names))


@pytest.mark.parametrize("fields", [{"use_rslora": True}, {"r": 7, "lora_alpha": 5}, {"rank_pattern": {"q_proj": 2}}])
def test_rows_with_ranks_and_scalings_of_their_own_have_the_logits_of_peft(models, rows, fields):
    base = {"target_modules": TARGETS["llama"]}
    both = models("llama", base, {**base, **fields})
    assert_same_logits(
        *(logits(model, rows, adapter_names=["one", "two", "one", "two", "two", "__base__", "one"]) for model in both)
    )


@pytest.mark.parametrize(
    ("names", "match"), [(ROWS[:3], "3"), (["one"] * 6 + ["nobody"], "nobody")], ids=["too few", "unknown"]
)
def test_wrong_names_are_refused_as_in_peft(three, rows, names, match):
    for model in three("llama"):
        with pytest.raises((ValueError, RuntimeError), match=match):
            logits(model, rows, adapter_names=names)


@pytest.mark.parametrize("state", ["train", "merged"])
def test_mixed_batches_are_refused_in_the_states_in_which_peft_refuses_them(three, rows, state):
    for model in three("llama"):
        model.train() if state == "train" else model.merge_adapter()
        with pytest.raises((ValueError, RuntimeError)):
            logits(model, rows, adapter_names=ROWS)


@both_families
def test_generating_with_rows_of_different_adapters_gives_the_tokens_of_peft(three, rows, family):
    outputs = [
        model.generate(input_ids=rows, adapter_names=ROWS, max_new_tokens=4, do_sample=False, pad_token_id=0)
        for model in three(family)
    ]
    assert torch.equal(*outputs)


# Exchange in place


@both_families
def test_hotswap_gives_the_logits_of_peft(three, models, token_ids, tmp_path, family):
    source, _ = models(family, {"target_modules": TARGETS[family], "lora_alpha": 5})
    disturb(source, "one")  # a second time: other values than in the model that takes them
    source.save_pretrained(tmp_path)
    ours, theirs = three(family)
    before = logits(ours, token_ids)
    kept = {id(parameter) for parameter in ours.parameters()}
    ours.hotswap_adapter(tmp_path / "one", "one")
    hotswap_adapter(theirs, str(tmp_path / "one"), adapter_name="one")
    found = logits(ours, token_ids)
    assert_same_logits(found, logits(theirs, token_ids))
    assert_same_logits(found, logits(source, token_ids))
    assert not torch.equal(found, before) and {id(parameter) for parameter in ours.parameters()} == kept


@both_families
def test_hotswap_of_an_inactive_adapter_leaves_the_active_one(three, models, token_ids, tmp_path, family):
    source, _ = models(family, {"target_modules": TARGETS[family]})
    source.save_pretrained(tmp_path)
    for swap, model in zip((minilora.PeftModel.hotswap_adapter, hotswap_adapter), three(family), strict=True):
        before = logits(model, token_ids)
        swap(model, str(tmp_path / "one"), adapter_name="three")
        assert torch.equal(logits(model, token_ids), before)


@both_families
def test_hotswap_of_fewer_layers_silences_the_others_as_in_peft(models, token_ids, tmp_path, family):
    source, _ = models(family, {"target_modules": TARGETS[family][:1]})
    source.save_pretrained(tmp_path)
    ours, theirs = models(family, {"target_modules": TARGETS[family]})
    ours.hotswap_adapter(tmp_path / "one", "one")
    hotswap_adapter(theirs, str(tmp_path / "one"), adapter_name="one")
    assert_same_logits(logits(ours, token_ids), logits(theirs, token_ids))
    assert_same_logits(logits(ours, token_ids), logits(source, token_ids))


def test_hotswap_of_more_layers_is_refused_as_in_peft(models, token_ids, tmp_path):
    source, _ = models("llama", {"target_modules": TARGETS["llama"]})
    source.save_pretrained(tmp_path)
    for swap, model in zip(
        (minilora.PeftModel.hotswap_adapter, hotswap_adapter),
        models("llama", {"target_modules": ["q_proj"]}),
        strict=True,
    ):
        before = logits(model, token_ids)
        with pytest.raises((ValueError, RuntimeError)):
            swap(model, str(tmp_path / "one"), adapter_name="one")
        assert torch.equal(logits(model, token_ids), before)


# Defaults by architecture

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
NARROW = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
HALVES = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
HEADS_OF_8 = {**TINY, "head_dim": 8}
CAUSAL = {
    "llama": TINY,
    "mistral": TINY,
    "gemma": HEADS_OF_8,
    "gemma2": HEADS_OF_8,
    "qwen2": TINY,
    "qwen3": HEADS_OF_8,
    "stablelm": TINY,
    "phi": TINY,
    "opt": {**NARROW, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32, "pad_token_id": 0},
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global"], 2]],
        "vocab_size": 64,
    },
    "gpt_neox": TINY,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "falcon": NARROW,
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_seq_len": 32},
    "codegen": {**GPT, "rotary_dim": 4},
}
ENCODERS = {"bert": TINY, "roberta": TINY, "electra": {**TINY, "embedding_size": 16}, "deberta-v2": TINY}
SEQ2SEQ = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
    "bart": {
        **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in HALVES.items()},
        **{"d_model": 32, "vocab_size": 64, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 0},
        **{"eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": 1},
    },
}
MODELS = {
    kind: (factory, fields)
    for factory, table in (
        ("AutoModelForCausalLM", CAUSAL),
        ("AutoModel", ENCODERS),
        ("AutoModelForSeq2SeqLM", SEQ2SEQ),
    )
    for kind, fields in table.items()
}


def tiny(kind):
    factory, fields = MODELS[kind]
    torch.manual_seed(1)
    return getattr(transformers, factory).from_config(transformers.AutoConfig.for_model(kind, **fields)).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_default_targets_of_an_architecture_are_those_of_peft(kind):
    theirs = peft.get_peft_model(tiny(kind), peft.LoraConfig(r=4, lora_alpha=12, init_lora_weights=False))
    model = minilora.get_peft_model(tiny(kind), minilora.LoraConfig(r=4, lora_alpha=12))
    assert set(adapted_paths(model)) == set(theirs.base_model.targeted_module_names) != set()


@pytest.mark.parametrize("kind", MODELS)
def test_default_targets_of_an_architecture_give_the_outputs_of_peft(kind, tmp_path):
    theirs = peft.get_peft_model(tiny(kind), peft.LoraConfig(r=4, lora_alpha=12, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path)
    ours = minilora.PeftModel.from_pretrained(tiny(kind), tmp_path)
    ids = torch.randint(2, 64, (2, 6), generator=torch.Generator().manual_seed(2))
    more = {"decoder_input_ids": ids} if ours.config.is_encoder_decoder else {}
    with torch.no_grad():
        found, wanted, plain = (model(input_ids=ids, **more)[0] for model in (ours, theirs, tiny(kind)))
    assert_same_logits(found, wanted)
    assert (wanted - plain).abs().max() > 1e-4

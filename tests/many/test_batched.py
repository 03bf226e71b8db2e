"""A batch whose rows want different adapters gives each row what it would get alone, and leaves the model as it was."""

import itertools
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import minilora
from minilora import (
    MiniLoraError,
    PeftModel,
    QuantConfig,
    delete_adapter,
    get_peft_model,
    inject,
    merge,
    quantize_model,
    save_adapter,
    set_adapter,
    unmerge,
)
from minilora.errors import StateError
from minilora.lora.slot import own_parameters
from minilora.lora.slots import adapters_of, has_adapters
from minilora.many.adapted import disabled, unload
from minilora.many.batched import BASE, MixedLayer, batch_adapters
from minilora.many.hotswap import hotswap_adapter
from minilora.store.load import load_adapter
from tests.compare import close
from tests.models import lora

BF16 = torch.bfloat16


@pytest.fixture
def three(make_mlp, add):
    """Adapters of different ranks, scalings and layers; "a" is active. "b" is rsLoRA, "c" leaves ``mid`` alone."""
    model = make_mlp()
    add(model, "a")
    add(model, "b", ["mid", "last"], r=5, lora_alpha=7, use_rslora=True)
    add(model, "c", ["first", "last"], r=1, lora_alpha=2)
    set_adapter(model, "a")
    return model


@torch.no_grad()
def alone(model, x, names):
    """Row by row with ``set_adapter``; what was active stays so."""
    active, rows = adapters_of(model).active, []
    for row, name in zip(x.split(1), names, strict=True):
        if name == BASE:
            with disabled(model):
                rows.append(model(row))
        else:
            set_adapter(model, name)
            rows.append(model(row))
    set_adapter(model, active)
    return torch.cat([getattr(row, "logits", row) for row in rows])


@torch.no_grad()
def mixed(model, x, names):
    with batch_adapters(model, names):
        out = model(x)
    return getattr(out, "logits", out)


def exact_or_refused(model, x, names, want, snapshot):
    """A mixed batch may be refused; it may not be wrong."""
    before = snapshot(model)
    try:
        got = mixed(model, x, names)
    except MiniLoraError:
        pass
    else:
        close(got, want)
    assert snapshot(model) == before


# ---- every row gets its own


@pytest.mark.parametrize("names", [*itertools.permutations(["a", "b", "c", BASE], 3)], ids="-".join)
def test_rows_get_their_own_adapter(three, x, snapshot, names):
    names, before = [*names, *names], snapshot(three)
    want = alone(three, x, names)
    close(mixed(three, x, names), want)
    assert len({tuple(row.tolist()) for row in want}) == 6 and snapshot(three) == before


@pytest.mark.parametrize("active", ["a", "b", "cb", "cab"])
def test_what_is_active_does_not_matter(three, x, active):
    set_adapter(three, list(active))
    names = ["b", BASE, "a", "c", "a", BASE]
    close(mixed(three, x, names), alone(three, x, names))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_packed_layers_and_half_precision(make_mlp, add, x, double, dtype):
    model = quantize_model(make_mlp().to(dtype), QuantConfig(double_quant=double), ["first", "mid"])
    add(model, "a")
    add(model, "b", ["first"], r=2, lora_alpha=9)
    names = ["b", BASE, "a", "a", "b", BASE]
    got, want = mixed(model, x.to(dtype), names), alone(model, x.to(dtype), names)
    assert got.dtype == dtype
    close(got, want, 3e-2 if dtype == BF16 else 1e-5)


@pytest.mark.parametrize("variant", ["pissa", "olora", "mica", "vera", "orthogonal", "loftq", "lora_fa", "lora_xs"])
def test_every_low_rank_variant_can_be_mixed(make_mlp, add, x, variant):
    model = make_mlp()
    add(model, "v", variant=variant, r=4)
    add(model, "a", r=2)
    names = ["a", "v", BASE, "v", "a", "v"]
    close(mixed(model, x, names), alone(model, x, names))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_language_models(make_gpt2, make_llama, add, ids, family):
    if family == "gpt2":
        model = minilora.untie(make_gpt2())
        add(model, "a", ["wte", "c_attn", "lm_head"])
        add(model, "b", ["wte", "mlp.c_fc"], r=5, lora_alpha=4)
    else:
        model = quantize_model(make_llama(), QuantConfig(double_quant=True))
        add(model, "a", "all-linear")
        add(model, "b", ["embed_tokens", "q_proj"], r=5, lora_alpha=4)
    names = ["b", "a", BASE, "b"]
    rows = torch.cat([ids, ids])
    want = alone(model, rows, names)
    assert (want[0] - want[2]).abs().max() > 0.1 and (want[1] - want[3]).abs().max() > 0.1
    close(mixed(model, rows, names), want)


def test_a_tied_embedding_and_its_head(make_gpt2, add, ids):
    model = make_gpt2()
    add(model, "a", ["wte"], ensure_weight_tying=True)
    add(model, "b", ["c_attn"], r=5)
    rows, names = torch.cat([ids, ids]), ["b", "a", BASE, "a"]
    close(mixed(model, rows, names), alone(model, rows, names))


def test_an_embedding_that_scales_its_rows(add):
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    torch.manual_seed(0)
    model = nn.Sequential(Scaled(9, 5)).eval()
    add(model, "a", ["0"], r=2)
    tokens, names = torch.arange(6).view(3, 2), ["a", BASE, "a"]
    close(mixed(model, tokens, names), alone(model, tokens, names))


@pytest.mark.parametrize("shape", [(6, 12), (6, 1, 12), (6, 4, 12), (6, 2, 3, 12)], ids=str)
def test_inputs_of_any_rank(three, shape):
    x, names = torch.randn(shape, generator=torch.Generator().manual_seed(1)), ["c", "a", BASE, "b", "b", "a"]
    got = mixed(three, x, names)
    assert got.shape == (*shape[:-1], 5)
    close(got, alone(three, x, names))


def test_rows_that_became_several_are_taken_together(three):
    """Beams and flattened tokens: twelve rows for three names are four each."""
    x = torch.randn(12, 12, generator=torch.Generator().manual_seed(1))
    want = alone(three, x, ["b"] * 4 + [BASE] * 4 + ["a"] * 4)
    close(mixed(three, x, ["b", BASE, "a"]), want)


# ---- as arguments of the model


def test_forward_takes_adapter_names(make_llama, randomize, ids):
    model = randomize(get_peft_model(make_llama(), lora(["q_proj", "down_proj"]), "a"), 1)
    model.add_adapter("b", lora(["v_proj"], r=2, init_lora_weights=False))
    names, rows = ["b", "a", BASE, "a"], torch.cat([ids, ids])
    want = alone(model, rows, names)
    with torch.no_grad():
        close(model(rows, adapter_names=names).logits, want)
        close(model(input_ids=rows, adapter_names=names).logits, want)
        close(model(rows).logits, alone(model, rows, ["a"] * 4))


def test_only_a_model_that_generates_seems_to(make_llama, make_mlp):
    config = lora(["q_proj"])
    assert hasattr(get_peft_model(make_llama(), config), "generate")
    plain = get_peft_model(make_mlp(), lora(["first"]))
    assert not hasattr(plain, "generate") and not hasattr(plain.unload(), "generate")


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_takes_adapter_names(make_llama, randomize, ids, beams):
    model = randomize(get_peft_model(make_llama(), lora(["q_proj", "v_proj", "down_proj"], r=4), "a"), 1)
    model.add_adapter("b", lora(["v_proj", "up_proj"], r=2, init_lora_weights=False))
    names, rows = ["b", "a", BASE], torch.cat([ids, ids])[:3]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(rows)
    got = model.generate(rows, adapter_names=names, **options)
    options["attention_mask"] = options["attention_mask"][:1]
    want = []
    for row, name in zip(rows.split(1), names, strict=True):
        if name == BASE:
            with model.disable_adapter():
                want.append(model.generate(row, **options))
        else:
            model.set_adapter(name)
            want.append(model.generate(row, **options))
    assert torch.equal(got, torch.cat(want))
    assert len({tuple(row[8:].tolist()) for row in torch.cat(want)}) > 1


# ---- refusals


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["a", "z"] * 3, "no adapter is called 'z'; there are"),
        ([], "no adapter names"),
        (["a"] * 4, "4 adapter names for 6 rows"),
        (["a"] * 7, "7 adapter names for 6 rows"),
    ],
    ids=str,
)
def test_names_that_do_not_fit(three, x, snapshot, names, match):
    before, want = snapshot(three), three(x)
    with pytest.raises(StateError, match=match):
        mixed(three, x, names)
    assert snapshot(three) == before and torch.equal(three(x), want)


def test_training_mode_is_refused(three, x, snapshot):
    three.train()
    before = snapshot(three)
    with pytest.raises(StateError, match=r"for inference; call model\.eval\(\)"):
        mixed(three, x, ["a"] * 6)
    assert snapshot(three) == before


def test_merged_adapters_are_refused(three, x, snapshot):
    merge(three, ["b"])
    before = snapshot(three)
    with pytest.raises(StateError, match=r"\['b'\] are merged; unmerge before"):
        mixed(three, x, ["a"] * 6)
    assert snapshot(three) == before
    unmerge(three)
    close(mixed(three, x, ["a", "b"] * 3), alone(three, x, ["a", "b"] * 3))


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
    ],
    ids=str,
)
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("active", [["d"], ["a"], ["a", "d"]], ids="+".join)
def test_what_cannot_be_mixed_is_refused_and_elsewhere_does_no_harm(three, add, x, snapshot, fields, named, active):
    """An adapter that no row names must not show, on whichever layers it sits and however it is active."""
    add(three, "d", **fields)
    delete_adapter(three, "c")
    set_adapter(three, active)
    if named:
        before = snapshot(three)
        with pytest.raises(StateError, match="adapter 'd'"):
            mixed(three, x, ["a", "d", "b"] * 2)
        assert snapshot(three) == before
    else:
        names = ["a", BASE, "b"] * 2
        want = alone(three, x, names)
        if active == ["a"]:
            close(mixed(three, x, names), want)
        exact_or_refused(three, x, names, want, snapshot)


@pytest.mark.parametrize("active", [["d"], ["a"], ["a", "d"]], ids="+".join)
@pytest.mark.parametrize("names", ["adb_", "dd_a", "ab_a"])
def test_a_copy_of_a_module_gives_its_own_rows_only(three, add, x, snapshot, active, names):
    add(three, "d", targets=["first"], modules_to_save=["norm"])
    delete_adapter(three, "c")
    set_adapter(three, active)
    names = [BASE if name == "_" else name for name in names] + ["a", "d"]
    before = snapshot(three)
    close(mixed(three, x, names), alone(three, x, names))
    assert snapshot(three) == before


def test_a_copy_that_was_aside_while_the_model_trained_drops_nothing(make_mlp, x):
    model = make_mlp()
    model.norm = nn.Sequential(model.norm, nn.Dropout(0.5)).eval()
    inject(model, lora(["first"], modules_to_save=["norm"]), "d")
    inject(model.train(), lora(["first"]), "a")
    set_adapter(model, "a")
    model.eval()
    adapters_of(model).named("d")["norm"].train()
    close(mixed(model, x, ["d", "a", BASE] * 2), alone(model, x, ["d", "a", BASE] * 2))


def test_a_copy_of_a_block_beside_adapters_in_that_block(make_mlp, add, x, randomize):
    """One adapter copies the whole block, another adapts a layer in it: neither shows in the rows of the other."""
    model = nn.ModuleDict({"block": make_mlp(), "head": nn.Linear(5, 4)}).eval()
    model.forward = lambda x: model["head"](model["block"](x))
    inject(model, lora(["head"], modules_to_save=["block"]), "copy")
    randomize(model, 1)
    inject(model, lora(["block.first", "head"]), "inner")
    randomize(model, 2)
    names = ["copy", "inner", BASE, "copy", "inner", "inner"]
    for active in ("copy", "inner"):
        set_adapter(model, active)
        close(mixed(model, x, names), alone(model, x, names))


class Tokens(nn.Module):
    """A table, a layer and a head, which is tied to the table or not."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mid, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(torch.tanh(self.mid(self.table(x))))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("active", "abc")
def test_token_rows_give_their_own_rows_only(tied, active, randomize):
    model = Tokens(tied).eval()
    inject(model, lora(["mid"], trainable_token_indices={"table": [1, 4]}), "a")
    randomize(model, 1)
    inject(
        model, lora(["mid"], trainable_token_indices={"table": [4, 7]} if tied else {"table": [4, 7], "head": [2]}), "b"
    )
    randomize(model, 2)
    inject(model, lora(["mid", "table"], ensure_weight_tying=tied), "c")
    randomize(model, 3)
    set_adapter(model, active)
    x = torch.randint(11, (6, 9), generator=torch.Generator().manual_seed(0))
    names = ["a", "b", BASE, "c", "b", "a"]
    close(mixed(model, x, names), alone(model, x, names))


def test_a_copy_that_returns_no_rows_is_refused(make_mlp, x):
    model = make_mlp()
    inject(model, lora(["first"], modules_to_save=["norm"]), "a")
    for module in (adapters_of(model).slots["norm"].base, adapters_of(model).named("a")["norm"]):
        module.forward = lambda x: (x, x)
    with pytest.raises(StateError, match="returns a tuple for 6 rows"):
        mixed(model, x, ["a"] * 6)


def test_an_active_dora_on_a_layer_of_its_own_does_not_show(make_mlp, add, x):
    model = make_mlp()
    add(model, "a", ["last"])
    add(model, "d", ["first"], use_dora=True)
    names = ["a", BASE, "a"] * 2
    close(mixed(model, x, names), alone(model, x, names))


def test_a_model_without_adapters(make_mlp, x):
    with pytest.raises(StateError, match="has no adapters"):
        mixed(make_mlp(), x, ["a"] * 6)


# ---- the model during and after


CHANGES = {
    "set_adapter": lambda model, folder: set_adapter(model, "b"),
    "delete_adapter": lambda model, folder: delete_adapter(model, "b"),
    "inject": lambda model, folder: inject(model, lora(["first"]), "new"),
    "merge": lambda model, folder: merge(model, ["b"]),
    "load_adapter": lambda model, folder: load_adapter(model, folder, "new"),
    "disabled": lambda model, folder: disabled(model).__enter__(),
    "unload": lambda model, folder: unload(model),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_during_a_batch_are_refused_and_undone(three, x, snapshot, tmp_path, change):
    save_adapter(three, tmp_path, "c")
    before, want, names = snapshot(three), three(x), ["b", "a", BASE] * 2
    adapters = adapters_of(three)
    known = (
        list(adapters.configs),
        adapters.active,
        adapters.merged,
        {p: list(s.kept) for p, s in adapters.slots.items()},
    )
    rows = alone(three, x, names)
    trains = [
        p.requires_grad for slot in adapters.slots.values() for v in slot.kept.values() for p in own_parameters(v)
    ]
    with batch_adapters(three, names):
        with pytest.raises(StateError, match="batch that mixes adapters"):
            CHANGES[change](three, tmp_path)
        close(three(x), rows)
    now = (
        list(adapters.configs),
        adapters.active,
        adapters.merged,
        {p: list(s.kept) for p, s in adapters.slots.items()},
    )
    assert now == known and has_adapters(three)
    assert trains == [
        p.requires_grad for slot in adapters.slots.values() for v in slot.kept.values() for p in own_parameters(v)
    ]
    assert snapshot(three) == before and torch.equal(three(x), want)


@pytest.mark.parametrize("how", ["plain", "error inside", "refused"])
def test_slots_are_afterwards_what_they_were(three, x, snapshot, how):
    before, want = snapshot(three), three(x)
    if how == "plain":
        with batch_adapters(three, ["a", "b"]):
            assert any(isinstance(module, MixedLayer) for module in three.modules())
    elif how == "error inside":
        with pytest.raises(KeyError), batch_adapters(three, ["a", "b"]):
            raise KeyError
    else:
        with pytest.raises(StateError), batch_adapters(three, ["a", "b", "c", "a", "b"]):
            three(x)
    assert snapshot(three) == before and torch.equal(three(x), want)
    assert not any(isinstance(module, MixedLayer) for module in three.modules())


def test_batches_inside_one_another(three, x, snapshot):
    before = snapshot(three)
    outer, inner = ["a", "b", BASE] * 2, ["c", "c", "a"] * 2
    first, second = alone(three, x, outer), alone(three, x, inner)
    with torch.no_grad(), batch_adapters(three, outer):
        close(three(x), first)
        with batch_adapters(three, inner):
            close(three(x), second)
        close(three(x), first)
    assert snapshot(three) == before


def test_another_thread_sees_the_usual_adapter(three, x):
    want, seen = three(x).detach(), []

    def other():
        with torch.no_grad():
            seen.append(three(x))

    with batch_adapters(three, ["b", BASE, "c"] * 2):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    close(seen[0], want)


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapters", [1, 2, 7])
def test_the_number_of_products_does_not_depend_on_the_number_of_adapters(make_mlp, add, x, adapters):
    model = make_mlp()
    for number in range(adapters):
        add(model, f"n{number}", r=1 + number % 3)
    names = [f"n{number % adapters}" for number in range(6)]
    with torch.no_grad(), batch_adapters(model, names), Counting() as counting:
        model(x)
    assert counting.products == 2 * 3, "A and B once for each of the three layers"


# ---- changed parameters


def steps(optimizer_class, **options):
    def change(model, x, folder):
        optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=0.1, **options)
        model(x).square().sum().backward()
        optimizer.step()

    return change


def write_data(model, x, folder):
    model.first.lora_B.data.mul_(-2)


def replace_data(model, x, folder):
    model.first.lora_B.data = model.first.lora_B.data * -2


def rescale(model, x, folder):
    model.first.scaling *= -2


def write_in_place(model, x, folder):
    with torch.no_grad():
        model.first.lora_B.mul_(-2)


def swap(model, x, folder):
    hotswap_adapter(model, folder, "a")


def load_state(model, x, folder):
    model.load_state_dict(
        {key: tensor * 1.5 for key, tensor in model.state_dict().items() if "lora_" in key}, strict=False
    )


WRITES = {
    "SGD": steps(torch.optim.SGD),
    "AdamW": steps(torch.optim.AdamW),
    "AdamW foreach": steps(torch.optim.AdamW, foreach=True),
    "AdamW fused": steps(torch.optim.AdamW, fused=True),
    "in place": write_in_place,
    "through data": write_data,
    "new data": replace_data,
    "scaling": rescale,
    "hotswap": swap,
    "load_state_dict": load_state,
}


@pytest.mark.parametrize("write", WRITES)
def test_the_next_batch_sees_changed_parameters(three, make_mlp, add, x, tmp_path, write):
    save_adapter(add(make_mlp(), "other", r=2, lora_alpha=5), tmp_path, "other")
    names = ["b", "a", BASE, "a", "c", "a"]
    before = mixed(three, x, names)
    WRITES[write](three, x, tmp_path)
    want = alone(three, x, names)
    assert (want[1] - before[1]).abs().max() > 1e-3
    close(mixed(three, x, names), want)


def test_the_next_batch_sees_a_new_adapter_in_the_place_of_a_deleted_one(make_mlp, add, x):
    """Its parameters may lie at the very addresses of the old one's: look until they do."""
    model = make_mlp()
    add(model, "a", ["first"])

    def come(name):
        inject(model, lora(["first"], init_lora_weights=False), name, activate=False)
        return [(id(p), p._version) for p in own_parameters(adapters_of(model).named(name)["first"])]

    for _ in range(300):
        old = come("old")
        mixed(model, x, ["old", "a", BASE] * 2)
        delete_adapter(model, "old")
        for _ in range(10):
            if come("new") == old:
                names = ["new", "a", BASE] * 2
                close(mixed(model, x, names), alone(model, x, names))
                return
            delete_adapter(model, "new")


# ---- threads


def hammer(model, x, repeats):
    """Two threads that serve different batches at the same time; the number of wrong answers."""
    batches = {name: alone(model, x, [name] * len(x)) for name in ("a", "b", "c", BASE)}
    patterns = [["a", "b", BASE], ["c", BASE, "a"]]
    wants = [torch.cat([batches[name][i : i + 1] for i, name in enumerate(names)]) for names in patterns]
    wrong, errors, usual = [0, 0], [], model(x).detach()

    def work(which):
        names, want = patterns[which], wants[which]
        try:
            with torch.no_grad():
                for repeat in range(repeats):
                    if repeat % 5 == 4:
                        got, want_now = model(x), usual
                    else:
                        got, want_now = mixed(model, x, names), want
                    wrong[which] += not torch.allclose(got, want_now, rtol=1e-5, atol=1e-5)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return sum(wrong)


@pytest.fixture
def eager_switching():
    """Threads take turns a hundred times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def tiny(add):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).eval()
    add(model, "a", ["0", "1"], r=2)
    add(model, "b", ["0"], r=1, lora_alpha=5)
    add(model, "c", ["1"], r=2, lora_alpha=3)
    set_adapter(model, "a")
    return model


def test_two_threads_never_get_each_others_rows(tiny, eager_switching, snapshot):
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    before = snapshot(tiny)
    assert hammer(tiny, x, 5000) == 0
    assert snapshot(tiny) == before and adapters_of(tiny).blocks == ()


def test_the_model_is_a_peft_model_all_the_while(make_mlp, randomize, x):
    model = randomize(get_peft_model(make_mlp(), lora(), "a"), 1)
    model.add_adapter("b", lora(["mid"], r=2, init_lora_weights=False))
    names = ["a", "b", BASE] * 2
    with torch.no_grad(), model.batch_adapters(names):
        assert isinstance(model, PeftModel)
        close(model(x), alone_outside := mixed(model, x, names))
    close(alone_outside, alone(model, x, names))

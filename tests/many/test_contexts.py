"""Whose rows are they? A block of ``batch_adapters`` belongs to one model and one context, and it ends however its code ends."""

import asyncio
import contextvars
import copy
import gc
import threading

import pytest
import torch

from minilora import LoraConfig, get_peft_model, inject, set_adapter
from minilora.errors import StateError
from minilora.lora.change import LOCK
from minilora.lora.slots import adapters_of
from minilora.many.adapted import delete_adapter, disabled
from minilora.many.batched import BASE, batch_adapters

ROWS = ["b", BASE, "c"]


def lora(**fields):
    return LoraConfig(
        **{"r": 2, "lora_alpha": 8, "target_modules": ["first", "last"], "init_lora_weights": False, **fields}
    )


@pytest.fixture
def make(make_mlp):
    """``make(seed)``: a model with adapters "a" (active), "b" and "c"."""

    def made(seed=0):
        model = get_peft_model(make_mlp(seed), lora(), "a")
        model.add_adapter("b", lora(r=3))
        model.add_adapter("c", lora())
        return model

    return made


@pytest.fixture
def x():
    return torch.randn(3, 12, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def outputs(model, x):
    """What each row gets by name: with ``ROWS``, with "c" for all, and with what is active."""
    return {"rows": model(x, adapter_names=ROWS), "c": model(x, adapter_names=["c"] * 3), "usual": model(x)}


def which(model, x, known):
    """The name in ``known`` of what the model gives now."""
    with torch.no_grad():
        got = model(x)
    names = [name for name, want in known.items() if torch.allclose(got, want, atol=1e-6)]
    assert len(names) == 1, names
    return names[0]


def untouched(model):
    record = adapters_of(model)
    shown = all(slot.over is None for slot in record.slots.values())
    return shown and record.blocks == () and not record.mixing and not record.is_bare


# ---- models


def test_rows_of_one_model_are_not_another_s(make, x):
    one, other = make(0), make(1)
    known, others = outputs(one, x), outputs(other, x)
    with one.batch_adapters(ROWS):
        assert which(one, x, known) == "rows" and which(other, x, others) == "usual"
        with other.batch_adapters(["c"] * 3):
            assert which(one, x, known) == "rows" and which(other, x, others) == "c"
            with torch.no_grad(), pytest.raises(StateError, match="3 adapter names for 4 rows"):
                other(torch.randn(4, 12))
        assert which(one, x, known) == "rows" and which(other, x, others) == "usual"
    assert which(one, x, known) == "usual" and untouched(one) and untouched(other)


def test_models_that_call_each_other_take_their_own_rows(make, x):
    one, other = make(0), make(1)
    want = outputs(one, x)["rows"], outputs(other, x)["c"]
    seen = []
    handle = one.first.register_forward_hook(lambda *_: seen.append(other(x, adapter_names=["c"] * 3)))
    with torch.no_grad():
        torch.testing.assert_close(one(x, adapter_names=ROWS), want[0])
    handle.remove()
    assert len(seen) <= 1 and all(torch.allclose(got, want[1], atol=1e-6) for got in seen)


def test_the_innermost_block_counts_and_the_outer_one_comes_back(make, x):
    model = make()
    known = outputs(model, x)
    with batch_adapters(model, ROWS):
        with batch_adapters(model, ["c"] * 3):
            assert which(model, x, known) == "c"
        assert which(model, x, known) == "rows"
    assert which(model, x, known) == "usual" and untouched(model)


# ---- contexts


def in_another_context(call):
    return contextvars.Context().run(call)


def in_another_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def hold(model, names, x=None):
    with batch_adapters(model, names):
        while True:
            yield None if x is None else model(x)


@pytest.mark.parametrize("elsewhere", [in_another_context, in_another_thread])
@pytest.mark.parametrize("how", ["closed", "forgotten", "finished", "broken"])
def test_a_generator_that_ends_elsewhere_leaves_no_lock(make, x, snapshot, elsewhere, how):
    model = make()
    known, before = outputs(model, x), snapshot(model)

    def steps():
        with batch_adapters(model, ROWS):
            yield
            if how == "broken":
                raise KeyError

    running = steps()
    next(running)
    assert not untouched(model)

    def end():
        nonlocal running
        if how == "closed":
            running.close()
        elif how == "forgotten":
            running = None
            gc.collect()
        else:
            with pytest.raises(KeyError if how == "broken" else StopIteration):
                next(running)

    elsewhere(end)
    assert untouched(model) and snapshot(model) == before and which(model, x, known) == "usual"
    set_adapter(model, "b")  # and it can be changed
    set_adapter(model, "a")
    assert which(model, x, known) == "usual"


def test_generators_that_take_turns_keep_to_their_rows_and_none_stays_behind(make, x):
    model = make()
    known = outputs(model, x)
    one, two = hold(model, ROWS), hold(model, ["c"] * 3)
    next(one)
    next(two)
    assert which(model, x, known) == "c"
    one.close()  # the outer one first
    assert which(model, x, known) == "c"
    two.close()
    assert which(model, x, known) == "usual" and untouched(model)


def test_tasks_have_their_own_rows(make, x):
    model = make()
    known, seen = outputs(model, x), {}

    async def serve(name, names):
        for _ in range(3):
            with batch_adapters(model, names):
                await asyncio.sleep(0)
                seen.setdefault(name, []).append(which(model, x, known))
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            seen.setdefault("between", []).append(which(model, x, known))

    async def both():
        await asyncio.gather(serve("rows", ROWS), serve("c", ["c"] * 3))

    asyncio.run(both())
    assert seen == {"rows": ["rows"] * 3, "c": ["c"] * 3, "between": ["usual"] * 6} and untouched(model)


def test_a_task_that_outlives_the_block_has_the_usual_adapter(make, x):
    model = make()
    known, seen = outputs(model, x), []

    async def later(wait):
        await asyncio.sleep(wait)
        seen.append(which(model, x, known))

    async def main():
        with batch_adapters(model, ROWS):
            inside, outside = asyncio.create_task(later(0)), asyncio.create_task(later(0.05))
            await inside
            seen.append(await asyncio.to_thread(which, model, x, known))  # takes the context along
        await outside

    asyncio.run(main())
    assert seen == ["rows", "rows", "usual"] and untouched(model)


def test_a_block_that_the_collector_ends_amid_a_change_is_left_right_after_it(make, x, snapshot):
    model = make()
    known, before = outputs(model, x), snapshot(model)
    running = hold(model, ROWS)
    next(running)
    with LOCK:
        running.close()
        assert not adapters_of(model).mixing  # what is added in this change is not refused
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    assert untouched(model) and snapshot(model) == before and which(model, x, known) == "usual"


@pytest.mark.parametrize("elsewhere", [in_another_context, in_another_thread])
def test_a_disabled_block_ends_where_its_generator_does(make, x, snapshot, elsewhere):
    model = make()
    known, before = outputs(model, x), snapshot(model)

    def steps():
        with disabled(model):
            yield

    running = steps()
    next(running)
    elsewhere(running.close)
    assert untouched(model) and snapshot(model) == before and which(model, x, known) == "usual"


# ---- what goes on beside a block


def test_blocks_of_different_adapters_at_the_same_time(make, x):
    """None of them had to know what the other one names."""
    model = make()
    known = outputs(model, x)
    running = hold(model, ROWS)
    next(running)
    model.add_adapter("new", lora(r=1))
    with torch.no_grad():
        got = model(x, adapter_names=["new", BASE, "b"])
    running.close()
    with torch.no_grad():
        torch.testing.assert_close(got, model(x, adapter_names=["new", BASE, "b"]))
    assert which(model, x, known) == "usual" and untouched(model)


def test_an_adapter_on_other_layers_can_come_while_a_batch_runs(make, x):
    model = make()
    with torch.no_grad(), batch_adapters(model, ROWS):
        want = model(x)
        inject(model, lora(target_modules=["mid"]), "new", activate=False)
        torch.testing.assert_close(model(x), want)
        inner = model(x, adapter_names=["new"] * 3)
        torch.testing.assert_close(model(x), want)
    assert untouched(model)
    set_adapter(model, "new")
    with torch.no_grad():
        torch.testing.assert_close(model(x), inner)


def test_a_state_dict_taken_meanwhile_is_the_usual_one(make, x):
    model = make()
    want = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    with batch_adapters(model, ROWS):
        got = model.state_dict()
        assert [name for name, _ in model.named_parameters()] == names
        assert model.first.in_features == 12 and model.first.bias is not None
    assert got.keys() == want.keys() and all(torch.equal(got[key], tensor) for key, tensor in want.items())


@pytest.mark.parametrize("block", [lambda model: batch_adapters(model, ROWS), disabled], ids=["rows", "disabled"])
def test_a_copy_made_in_a_block_is_in_no_block(make, x, block):
    model = make()
    known = outputs(model, x)
    with block(model):
        twin = copy.deepcopy(model)
    set_adapter(twin, "b")
    delete_adapter(twin, "c")
    set_adapter(twin, "a")
    assert which(twin, x, known) == "usual" and untouched(twin)
    assert which(model, x, known) == "usual" and untouched(model)


def test_a_value_written_meanwhile_is_of_the_next_block(make, x):
    model = make()
    with torch.no_grad(), batch_adapters(model, ["b"] * 3):
        before = model(x)
        adapters_of(model).named("b")["first"].lora_B.mul_(2)
        assert torch.equal(model(x), before)
    with torch.no_grad(), batch_adapters(model, ["b"] * 3):
        assert not torch.allclose(model(x), before)

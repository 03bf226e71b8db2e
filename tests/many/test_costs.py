"""Cost grows with the work and not with its square: four times as much takes at most five times the steps.

Steps are lines of Python, counted by a trace function, so that a busy machine changes nothing; ``benchmarks/cost.py`` has the seconds.
"""

import gc
import sys

import pytest
import torch
from torch import nn

import minilora
from minilora import LoraConfig, delete_adapter, get_peft_model, inject, load_adapter, merge, save_adapter, set_adapter
from minilora.lora.slots import adapters_of
from minilora.many.adapted import count_parameters, disabled, unload
from minilora.many.batched import batch_adapters
from minilora.many.combine import add_weighted_adapter
from minilora.many.hotswap import hotswap_adapter
from minilora.many.merging import unmerge

MOST = 5.0  # times the steps, for four times the work
SAME = 1.1  # times the steps, where the work is the same


def steps(call):
    """Lines of Python that run in ``call``, in minilora and in torch."""
    count = 0

    def line(frame, event, argument):
        nonlocal count
        count += event == "line"
        return line

    gc.collect()  # what other tests left behind ends now, and not while lines are counted
    gc.disable()
    sys.settrace(line)
    try:
        call()
    finally:
        sys.settrace(None)
        gc.enable()
    return count


def layers(count, width=3):
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(width, 4)}) for _ in range(count))}
    ).eval()


def lora(targets=("q",), **fields):
    return LoraConfig(**{"r": 1, "lora_alpha": 3, "target_modules": targets, **fields})


def paths(count):
    return [f"layers.{number}.q" for number in range(count)]


def loaded(count, size=2):
    """A model of ``size`` layers with this many adapters."""
    model = get_peft_model(layers(size), lora(init_lora_weights=False), "a0")
    for number in range(1, count):
        model.add_adapter(f"a{number}", lora(init_lora_weights=False))
    return model


def mixed(model):
    x = torch.ones(3, 3)
    with torch.no_grad(), batch_adapters(model, ["a1", "__base__", "a3"]):
        model["layers"][0]["q"](x)


# What must not depend on how many adapters there are.
OF_ONE = {
    "add": lambda model, folder: model.add_adapter("new", lora()),
    "add and activate": lambda model, folder: inject(model, lora(), "new"),
    "switch": lambda model, folder: set_adapter(model, "a2"),
    "stack": lambda model, folder: set_adapter(model, ["a2", "a3"]),
    "mix": lambda model, folder: mixed(model),
    "merge": lambda model, folder: merge(model),
    "disable": lambda model, folder: disabled(model).__enter__(),
    "save": lambda model, folder: save_adapter(model, folder / "out", "a1"),
    "load": lambda model, folder: load_adapter(model, folder / "a", "new", activate=False),
    "hotswap": lambda model, folder: hotswap_adapter(model, folder / "a", "a1"),
    "combine": lambda model, folder: add_weighted_adapter(model, ["a1", "a2"], [1, 2], "new", "cat"),
    "unload": lambda model, folder: unload(model),
}


@pytest.mark.parametrize("name", OF_ONE)
def test_what_concerns_one_adapter_costs_the_same_among_many(name, tmp_path):
    save_adapter(loaded(2), tmp_path / "a", "a1")
    few, many = loaded(5), loaded(40)
    held = adapters_of(few), adapters_of(many)  # what other libraries do when a tensor dies is not counted
    OF_ONE[name](loaded(5), tmp_path)  # what is kept for the next call is there
    small, large = steps(lambda: OF_ONE[name](few, tmp_path)), steps(lambda: OF_ONE[name](many, tmp_path))
    assert small > 20 and large <= SAME * small
    del held


def test_a_mixed_batch_builds_what_it_names_and_nothing_else(monkeypatch):
    asked = []
    plain = minilora.LoRALinear.as_lora
    monkeypatch.setattr(minilora.LoRALinear, "as_lora", lambda adapter: asked.append(adapter) or plain(adapter))
    model = loaded(30, size=3)
    mixed(model)
    slots = adapters_of(model).slots.values()
    assert {id(adapter) for adapter in asked} == {id(slot.kept[name]) for slot in slots for name in ("a1", "a3")}
    assert len(asked) == 2 * 3


# What may cost in proportion to the adapters that there are, or to the layers.
OF_ALL = {
    "delete one of many": lambda n, folder: (loaded(n), lambda model: delete_adapter(model, "a1")),
    "count": lambda n, folder: (loaded(n), count_parameters),
    "add many": lambda n, folder: (loaded(1), lambda model: [model.add_adapter(f"n{i}", lora()) for i in range(n)]),
    "inject": lambda n, folder: (layers(n), lambda model: inject(model, lora(bias="lora_only"))),
    "names": lambda n, folder: (layers(n), lambda model: inject(model, lora(paths(n)))),
    "copies": lambda n, folder: (
        nn.ModuleDict({"copied": layers(n), "q": nn.Linear(3, 4)}),
        lambda model: inject(model, lora(["q"], modules_to_save=[f"copied.{path}" for path in paths(n)], bias="all")),
    ),
    "patterns": lambda n, folder: (layers(n), lambda model: inject(model, patterns(n))),
    "merge": lambda n, folder: (inject(layers(n), lora()), merge),
    "unmerge": lambda n, folder: (was_merged(n), unmerge),
    "switch": lambda n, folder: (two(n), lambda model: set_adapter(model, ["b", "a"])),
    "save": lambda n, folder: (inject(layers(n), lora(paths(n))), lambda model: save_adapter(model, folder / f"{n}")),
    "load": lambda n, folder: (layers(n), lambda model: load_adapter(model, folder / f"layers-{n}")),
    "quantize": lambda n, folder: (layers(n, 64), minilora.quantize_model),
}


def patterns(n):
    each = {path: 1 + number % 3 for number, path in enumerate(paths(n))}
    return lora(rank_pattern=each, alpha_pattern={r".*\.0\.q": 5} | each)


def was_merged(n):
    model = inject(layers(n), lora(bias="lora_only"))
    merge(model)
    return model


def two(n):
    return inject(inject(layers(n), lora(), "a"), lora(paths(n)), "b")


@pytest.mark.parametrize("name", OF_ALL)
def test_four_times_the_work_takes_at_most_five_times_the_steps(name, tmp_path):
    counts = []
    for n in (10, 40, 10, 40):  # the first two for what is kept for the next call
        if name == "load":
            save_adapter(inject(layers(n), lora(paths(n))), tmp_path / f"layers-{n}")
        model, call = OF_ALL[name](n, tmp_path)
        counts.append(steps(lambda call=call, model=model: call(model)))
    small, large = counts[2:]
    assert small > 20 and large <= MOST * small, f"{small} steps, then {large}"

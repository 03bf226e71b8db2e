"""Ctrl-C at any line of a public call: the model is as before the call, or as after it, and nothing between.

A trace function raises ``KeyboardInterrupt`` before the n-th line that runs in minilora's files. The quick test tries lines spread over
each call, the slow one every line.
"""

import hashlib
import threading

import pytest
import torch
from torch import nn

import minilora
from minilora import LoraConfig, PeftModel, get_peft_model, inject, quantize_model
from minilora.lora.change import LOCK
from minilora.lora.slots import adapters_of, has_adapters
from minilora.many.adapted import delete_adapter, disabled, set_adapter, unload
from minilora.many.batched import batch_adapters
from minilora.many.combine import add_weighted_adapter
from minilora.many.hotswap import hotswap_adapter
from minilora.many.merging import merge, unmerge
from minilora.peft import set_peft_model_state_dict
from minilora.qlora.calibrate import calibrate
from minilora.qlora.kbit import prepare_model_for_kbit_training
from minilora.store.load import load_adapter, restore_adapter
from tests.interrupt import Interrupt

QUICK = 40  # lines tried of each call in the quick test

# A file that was opened in the very line before the interrupt is closed by the garbage collector, which says so.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")


# ---- models


def config(targets=("first", "mid", "last"), **fields):
    return LoraConfig(
        **{"r": 2, "lora_alpha": 6, "target_modules": list(targets), "init_lora_weights": False, **fields}
    )


def three(make):
    """Adapters "a" (with biases), "b" and "c"; "a" is active."""
    model = get_peft_model(make(), config(bias="lora_only"), "a")
    model.add_adapter("b", config(["first", "mid"], r=3))
    model.add_adapter("c", config(["mid", "last"]))
    return model


def without_biases(make):
    model = three(make)
    delete_adapter(model, "a")
    model.add_adapter("a", config())
    return model


def stacked(make):
    model = three(make)
    set_adapter(model, ["a", "b"])
    return model.train()


def merged(make):
    model = three(make)
    set_adapter(model, ["a", "c"])
    merge(model, ["a", "b"])
    return model


class Norm(nn.LayerNorm):
    """A norm by its name."""


def half(make):
    model = make().to(torch.bfloat16)
    model.norm = Norm(20, dtype=torch.bfloat16)
    return model


def tied(make):
    model = nn.Module()
    model.table, model.head = nn.Embedding(9, 12), nn.Linear(12, 9, bias=False)
    model.head.weight = model.table.weight
    model.get_output_embeddings = lambda: model.head
    model.config = type("Config", (), {})()
    model.config.tie_word_embeddings = True
    return model


def one_layer(make):
    """A model that stands apart in train and eval mode."""
    model = make().train()
    model.norm.eval()
    return model


# ---- calls: (how the model is made, the call)

X = torch.randn(3, 12, generator=torch.Generator().manual_seed(4))


def block(make_block):
    def call(model, folder):
        with make_block(model):
            model(X)

    return call


def nested(model, folder):
    with disabled(model), model.disable_adapter():
        model(X)


def two_blocks(model, folder):
    with batch_adapters(model, ["b", "c", "__base__"]), model.batch_adapters(["b", "b", "c"]):
        model(X)


def new_tensors(model):
    return {key: tensor + 1 for key, tensor in minilora.get_peft_model_state_dict(model, adapter_name="a").items()}


CALLS = {
    "inject": (lambda make: make(), lambda m, f: inject(m, config(bias="all", modules_to_save=["norm"]))),
    "inject another": (three, lambda m, f: inject(m, config(["first"]), "new")),
    "inject loftq": (
        lambda make: make(),
        lambda m, f: inject(m, config(["first"], init_lora_weights="loftq", loftq_config={"loftq_bits": 4})),
    ),
    "inject modes": (one_layer, lambda m, f: inject(m, config())),
    "get_peft_model": (
        lambda make: make(),
        lambda m, f: get_peft_model(m, config(bias="all"), autocast_adapter_dtype=False),
    ),
    "add_adapter": (three, lambda m, f: m.add_adapter("new", config(["last"], modules_to_save=["norm"]))),
    "set_adapter": (stacked, lambda m, f: m.set_adapter(["c", "a"])),
    "delete_adapter": (three, lambda m, f: delete_adapter(m, "a")),
    "delete_adapter aside": (three, lambda m, f: delete_adapter(m, "b")),
    "delete_adapter of two": (stacked, lambda m, f: delete_adapter(m, "a")),
    "merge": (three, lambda m, f: m.merge_adapter()),
    "merge some": (stacked, lambda m, f: merge(m, ["b"])),
    "unmerge": (merged, lambda m, f: unmerge(m)),
    "unload": (stacked, lambda m, f: m.unload()),
    "unload merged": (merged, lambda m, f: unload(m, keep_merged=True)),
    "merge_and_unload": (three, lambda m, f: m.merge_and_unload()),
    "merge_and_unload merged": (merged, lambda m, f: m.merge_and_unload()),
    "disabled": (stacked, block(disabled)),
    "disabled merged": (merged, nested),
    "load_adapter": (three, lambda m, f: load_adapter(m, f / "b", "new")),
    "load_adapter beside": (stacked, lambda m, f: m.load_adapter(f / "b", "new", is_trainable=True)),
    "from_pretrained": (lambda make: make(), lambda m, f: PeftModel.from_pretrained(m, f / "b")),
    "hotswap": (three, lambda m, f: hotswap_adapter(m, f / "other", "c")),
    "restore_adapter": (three, lambda m, f: restore_adapter(m, f / "b", "b")),
    "set_peft_model_state_dict": (stacked, lambda m, f: set_peft_model_state_dict(m, new_tensors(m), "a")),
    "add_weighted_adapter": (three, lambda m, f: add_weighted_adapter(m, ["b", "c"], [1, -2.0], "new", "cat")),
    "quantize_model": (one_layer, lambda m, f: quantize_model(m)),
    "batch_adapters": (without_biases, two_blocks),
    "adapter_names": (without_biases, lambda m, f: m(X, adapter_names=["b", "c", "__base__"])),
    "untie": (tied, lambda m, f: minilora.untie(m)),
    "prepare_model_for_kbit_training": (half, lambda m, f: prepare_model_for_kbit_training(m, False)),
    "prepare all": (half, lambda m, f: prepare_model_for_kbit_training(m, False, upcast="all")),
    "calibrate": (one_layer, lambda m, f: calibrate(m, [X])),
    "save_pretrained": (merged, lambda m, f: m.save_pretrained(f / "saved", selected_adapters=["a"])),
    "print_trainable_parameters": (stacked, lambda m, f: m.print_trainable_parameters()),
}


# ---- states


def digest(tensor):
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha1(raw.numpy().tobytes()).hexdigest()


def name_of(thing):
    return type(thing).__name__


def state(model, mark):
    """Everything of a model and its adapters; ``mark`` says what stands for an object: ``id`` or its kind."""
    found = {
        "class": [kind.__name__ for kind in type(model).__mro__],
        "attributes": sorted(model.__dict__),
        **tree(model, mark),
        "tied": getattr(getattr(model, "config", None), "tie_word_embeddings", None),
    }
    if has_adapters(model):
        record = adapters_of(model)
        found["record"] = (
            list(record.configs.items()),
            list(record.variants.items()),
            record.active,
            record.merged,
            record.mixing,
            record.is_bare,
        )
        found["slots"] = [
            (path, mark(slot.parent), mark(slot.base), slot.merged is not None and mark(slot.merged))
            for path, slot in record.slots.items()
        ]
        found["standing"] = [
            (path, tree(slot.standing, mark)) for path, slot in record.slots.items() if isinstance(slot.base, nn.Module)
        ]
        found["kept"] = [
            (path, name, mark(value), [(digest(p), p.requires_grad) for p in own(value)])
            for path, slot in record.slots.items()
            for name, value in slot.kept.items()
        ]
    return found


def tree(module, mark):
    """What is in a module and below it, under its own names: PEFT's are made anew for each who asks."""
    inside = list(nn.Module.named_modules(module, remove_duplicate=False))
    return {
        "places": [(path, mark(m), m.training, type(m).__mro__[1].__name__, sorted(vars(m))) for path, m in inside],
        "hooks": [(path, len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in inside],
        "parameters": [
            (path, name, mark(p), p.requires_grad, digest(p))
            for path, m in inside
            for name, p in m._parameters.items()
            if p is not None
        ],
        "buffers": [(path, name, digest(b)) for path, m in inside for name, b in m._buffers.items() if b is not None],
    }


def own(value):
    if isinstance(value, nn.Parameter):
        return [value]
    return [p for name, p in value.named_parameters() if not name.startswith("base_layer")]


def differing(left, right):
    return [key for key in left.keys() | right.keys() if left.get(key) != right.get(key)]


@pytest.fixture(scope="module")
def folder(make_mlp, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(1)
    model = three(make_mlp)
    model.save_pretrained(folder)
    inject(model, config(["mid"], r=1, lora_alpha=5), "other")
    model.save_pretrained(folder, selected_adapters=["other"])
    return folder


def run(model, call, folder, at=0):
    """The trace, and how it ended: None, "interrupt", or another error, which an interrupt must not become."""
    torch.manual_seed(7)
    with Interrupt(at) as interrupt:
        try:
            call(model, folder)
        except KeyboardInterrupt:
            return interrupt, "interrupt"
        except Exception as error:
            return interrupt, repr(error)
    return interrupt, None


def half_states(name, make_mlp, folder, tries=None):
    """``(lines tried, where a half state was left)``."""
    make, call = CALLS[name]

    def fresh():
        torch.manual_seed(3)
        return make(make_mlp)

    run(fresh(), call, folder)  # what is kept for the next call is there
    model = fresh()
    interrupt, ended = run(model, call, folder)
    assert ended is None, ended
    lines, after = interrupt.lines, state(model, name_of)
    points = range(1, lines + 1) if tries is None else sorted({1 + i * lines // tries for i in range(tries)})
    bad: list = []
    unreached = 0
    for at in points:
        model = fresh()
        before = state(model, id)
        interrupt, ended = run(model, call, folder, at)
        if ended is None and not interrupt.where:
            unreached += 1  # what is kept for the next call makes it some lines shorter
        elif ended != "interrupt":
            bad.append((interrupt.where, ended))
        elif not free(LOCK):
            bad.append((interrupt.where, "locked"))
            while LOCK._is_owned():
                LOCK.release()
        elif state(model, id) == before:
            _, ended = run(model, call, folder)  # and it can be called again
            if wrong := ended or differing(after, state(model, name_of)):
                bad.append((interrupt.where, "again", wrong))
        elif wrong := differing(after, state(model, name_of)):
            bad.append((interrupt.where, wrong))
    assert unreached <= 1 + len(points) // 20
    return len(points), bad


def free(lock):
    """Whether another thread could take it."""
    got = []

    def take():
        got.append(lock.acquire(blocking=False))
        if got[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return got[0]


@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_leaves_no_half_state(name, make_mlp, folder):
    tried, bad = half_states(name, make_mlp, folder, QUICK)
    assert not bad, f"{len(bad)} of {tried} lines: {bad[:5]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_an_interrupt_at_any_line_leaves_no_half_state(name, make_mlp, folder):
    tried, bad = half_states(name, make_mlp, folder)
    assert not bad, f"{len(bad)} of {tried} lines: {bad[:5]}"

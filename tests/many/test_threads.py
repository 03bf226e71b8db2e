"""One thread serves with the active adapter while another one saves, loads beside, counts, adds: no forward may be wrong."""

import contextlib
import io
import sys
import threading

import pytest
import torch
from torch import nn

import minilora
from minilora import LoraConfig, get_peft_model, inject, merge, save_adapter, unmerge
from minilora.errors import StateError
from minilora.lora.slots import adapters_of

LAYERS = 8


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(LAYERS))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return self.head(x)


def lora(**fields):
    return LoraConfig(**{"r": 2, "lora_alpha": 8, "target_modules": [f"layers.{n}" for n in range(LAYERS)],
                         "init_lora_weights": False, **fields})  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = get_peft_model(Deep().eval(), lora(bias="all", modules_to_save=["head"]), "a")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.add_adapter("b", lora(r=3))
    model.add_adapter("c", lora(r=3))
    model.add_adapter("broken", lora(target_modules=["layers.7"]))
    adapters_of(model).named("broken")["layers.7"].lora_B.data.fill_(float("nan"))
    return model


@pytest.fixture
def folder(model, tmp_path):
    save_adapter(model, tmp_path / "b", "b")
    return tmp_path


@pytest.fixture(autouse=True)
def eager_switching():
    """Threads take turns a thousand times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(interval)


def load(model, folder):
    model.load_adapter(folder / "b", "new")
    model.delete_adapter("new")


def add(model, folder):
    model.add_adapter("new", lora(target_modules=["head", "layers.1"]))
    model.delete_adapter("new")


def combine(model, folder):
    model.add_weighted_adapter(["b", "c"], [1, -2.0], "new", "cat")
    model.delete_adapter("new")


def count(model, folder):
    with contextlib.redirect_stdout(io.StringIO()):
        model.print_trainable_parameters()


def refused(model, folder):
    with pytest.raises(StateError, match="NaN"):
        merge(model, ["a", "broken"])


def merged(model, folder):
    merge(model)
    unmerge(model)


OPERATIONS = {
    "save": lambda model, folder: model.save_pretrained(folder / "out", selected_adapters=["a", "b"]),
    "state dict": lambda model, folder: minilora.get_peft_model_state_dict(model, adapter_name="a"),
    "count": count,
    "add and delete": add,
    "load and delete": load,
    "combine and delete": combine,
    "hotswap": lambda model, folder: model.hotswap_adapter(folder / "b", "c"),
    "a merge that is refused": refused,
    "merge and unmerge": merged,
}


def beside(call, model, x, least=30):
    """``(forwards, wrong ones)`` of another thread while this one calls, ``least`` forwards at least."""
    with torch.no_grad():
        want = model(x)
    ends, done, wrong = threading.Event(), [0], [0]

    def serve():
        with torch.no_grad():
            while not ends.is_set():
                wrong[0] += not torch.allclose(model(x), want, atol=1e-5)
                done[0] += 1

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        while done[0] < least:
            call()
    finally:
        ends.set()
        thread.join()
    return done[0], wrong[0]


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_forward_of_another_thread_is_wrong(model, folder, name):
    x = torch.randn(4, 6)
    forwards, wrong = beside(lambda: OPERATIONS[name](model, folder), model, x)
    assert wrong == 0, f"{wrong} of {forwards}"


def test_the_count_sees_a_bare_model(model):
    """Were an operation to empty the slots for a moment, it would be seen."""

    def call():
        with model.disable_adapter():
            pass

    assert beside(call, model, torch.randn(4, 6), 200)[1] > 0


@pytest.mark.parametrize("aside", [False, True])
def test_many_threads_that_add_lose_nothing(model, aside):
    names = [f"n{number}" for number in range(12)]
    targets = {name: ["head"] if number % 2 else ["layers.0", "layers.3"] for number, name in enumerate(names)}
    errors = []

    def work(own):
        try:
            for name in own:
                inject(model, lora(target_modules=targets[name]), name, activate=not aside)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(names[start::4],)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    record = adapters_of(model)
    assert {*names, "a", "b", "c", "broken"} == record.configs.keys()
    assert all(sorted(record.named(name)) == sorted(targets[name]) for name in names)
    (active,) = record.active
    for slot in record.slots.values():
        if isinstance(slot.base, nn.Module):
            assert slot.standing is slot.kept.get(active, slot.base)


def test_of_two_that_take_one_name_one_is_refused(model):
    results = []

    def work():
        try:
            inject(model, lora(), "same", activate=False)
            results.append("added")
        except StateError:
            results.append("refused")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["added", "refused", "refused", "refused"]

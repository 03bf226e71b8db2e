"""LoRA on every architecture: right, or refused by name; and docs/architectures.md says which.

A part that has all kinds of layers in it runs by default, the whole with ``make test-all``.
"""

import copy
import os

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch

import minilora
from minilora.lora.layer import LoRALinear
from tests.architectures import checks, table, tiny

FAST = [
    "albert", "bart", "bert", "blip", "clip", "deepseek_v3", "distilbert", "gpt2", "gpt_neo",
    "granitemoehybrid", "llama", "llava", "mamba", "mixtral", "mobilebert", "opt", "phi3", "qwen2_vl", "rwkv",
    "siglip", "switch_transformers", "t5", "vit", "wav2vec2", "wavlm", "whisper",
]  # fmt: skip
BUILT, MISSING = table.read()


@pytest.mark.parametrize("model_type", FAST)
def test_right_or_refused_by_name(model_type):
    outcome = checks.examine(model_type)
    wrong = {name: answer for name, answer in outcome.answers.items() if answer.startswith("WRONG")}
    assert not wrong and not outcome.not_built
    assert table.row(outcome) == BUILT[model_type], "run python tests/architectures/table.py"


def test_the_page_has_every_model_type():
    assert sorted([*BUILT, *MISSING]) == tiny.model_types(), "run python tests/architectures/table.py"
    assert len(BUILT) >= 400


def test_the_counts_are_those_of_the_rows():
    assert table.page(BUILT, MISSING) == table.PAGE.read_text(encoding="utf-8")
    assert not [name for name, line in BUILT.items() if "WRONG" in table.answers(line).values()]


@pytest.mark.slow
def test_the_whole_page():
    found = table.outcomes(tiny.model_types(), os.cpu_count() or 1)
    assert table.page(*table.lines_of(found)) == table.PAGE.read_text(encoding="utf-8"), (
        "run python tests/architectures/table.py"
    )


# ---- a fault is seen


@pytest.fixture(scope="module")
def trial():
    return checks.begin("llama")


def _twice(self, x):
    return self.base_layer(x) + 2 * (ORIGINAL(self, x) - self.base_layer(x))


def _without_a(self, x):
    return self.base_layer(x) + self.scaling * (x @ self.lora_A.detach().t()) @ self.lora_B.t()


def _loads_zeros(load):
    def loaded(model, folder):
        load(model, folder)
        with torch.no_grad():
            next(iter(checks.adapters(model).values())).lora_B.zero_()

    return loaded


def _saves_zeros(save):
    def saved(model, folder):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            next(iter(checks.adapters(copied).values())).lora_B.zero_()
        save(copied, folder)

    return saved


ORIGINAL = LoRALinear.forward


@pytest.mark.parametrize(
    ("check", "place", "name", "fault"),
    [
        ("law", LoRALinear, "forward", lambda _: _twice),
        ("step", LoRALinear, "forward", lambda _: _without_a),
        ("packed", minilora.QuantLinear, "forward", lambda old: lambda self, x: old(self, x) + 1),
        ("merge", minilora, "unmerge", lambda _: lambda model: None),
        ("merge", LoRALinear, "delta_weight", lambda old: lambda self: 2 * old(self)),
        ("reload", minilora, "load_adapter", _loads_zeros),
        ("peft_reads", minilora, "save_adapter", _saves_zeros),
        ("peft_writes", minilora, "load_adapter", _loads_zeros),
    ],
)
def test_a_fault_of_the_library_is_seen(trial, check, place, name, fault, monkeypatch):
    monkeypatch.setattr(place, name, fault(getattr(place, name)))
    with pytest.raises(checks.Wrong):
        checks.CHECKS[check](trial)


def test_an_adapter_that_is_passed_by_is_no_dead_layer(monkeypatch):
    monkeypatch.setattr(LoRALinear, "forward", lambda self, x: self.base_layer(x))
    answers = checks.examine("llama").answers
    assert set(answers.values()) == {next(iter(answers.values()))}
    assert answers["law"].startswith("WRONG: model.layers.0.self_attn.q_proj: the weight has a gradient")

"""Asking: with a system turn or without, a tick for each token, and refused where no template could hold what is said."""

import pytest
import torch

from minilora.errors import DataError
from minilora.hf import answers, load_model, load_tokenizer
from minilora.training import memory
from minilora.training.memory import memory_mb, new_peak


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load_model(model_folder), load_tokenizer(model_folder)


def test_a_system_turn_stands_before_the_prompt(loaded, monkeypatch):
    model, tokenizer = loaded
    seen = []
    monkeypatch.setattr(model, "generate", lambda **given: seen.append(given["input_ids"]) or given["input_ids"])
    answers(model, tokenizer, ["How?"], 3, system="Be a keeper.")
    answers(model, tokenizer, ["How?"], 3)
    turns = [{"role": "system", "content": "Be a keeper."}, {"role": "user", "content": "How?"}]
    for ids, wanted in zip(seen, (turns, turns[1:]), strict=True):
        text = tokenizer.apply_chat_template(wanted, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(ids[0]) == text


def test_a_system_turn_without_a_template_is_refused(loaded, model_folder):
    tokenizer = load_tokenizer(model_folder)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template that could hold a system turn; leave it out"):
        answers(loaded[0], tokenizer, ["How?"], 3, system="Be a keeper.")


def test_every_token_ticks(loaded, monkeypatch):
    from contextlib import contextmanager

    count = [0]

    @contextmanager
    def busy(name, total):
        count.append(total)

        def tick():
            count[0] += 1

        yield tick

    monkeypatch.setattr("minilora.hf.generate.busy", busy)
    model, tokenizer = loaded
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    answers(model, tokenizer, ["How?", "Why is that so?"], 5)
    assert count == [5, 5]


@pytest.mark.skipif(not memory._RESET.exists(), reason="this system does not let the peak begin again")
def test_the_peak_begins_again():
    large = torch.ones(60_000_000)
    new_peak()
    high = memory_mb(peak=True)
    del large
    assert memory_mb(peak=True) >= high
    new_peak()
    low = memory_mb(peak=True)
    assert low < high - 150
    large = torch.ones(60_000_000)
    assert memory_mb(peak=True) > low + 200 and large.max() == 1

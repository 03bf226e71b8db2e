"""Patterns find the very keys that PEFT's regular expression finds, and do not try every key on every path."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import LoraConfig
from minilora.lora import patterns
from minilora.lora.patterns import Patterns
from minilora.lora.targets import endings, ends_with, inside, select

part = st.sampled_from(["q", "qq", "v", "0", "1", "10", "a_b", "a-b", "aXb", ""])
paths = st.lists(part, min_size=1, max_size=4).map(".".join)
expressions = st.sampled_from(
    [r".*\.0\..*", "q|v", "^q$", r"(a.b|q)\.0", "q+", r"layers\.\d", ".", "..", "a.b", ".q", "q."]
)


def by_definition(keys, path):
    return [key for key in keys if re.match(rf"(.*\.)?({key})$", path)]


@given(keys=st.lists(paths.filter(bool) | expressions, max_size=6, unique=True), path=paths)
def test_the_keys_found_are_those_of_the_definition(keys, path):
    want = by_definition(keys, path)
    assert Patterns(keys).all(path) == want
    assert Patterns(keys).first(path) == (want[0] if want else None)


@pytest.mark.parametrize("order", [1, -1])
def test_the_first_key_wins_be_it_a_name_or_an_expression(order):
    keys = ["q_proj", r".*\.0\.q_proj", "layers.0.q_proj"][::order]
    config = LoraConfig(
        r=8, lora_alpha=3, target_modules=["q_proj"], rank_pattern={key: n + 1 for n, key in enumerate(keys)}
    )
    assert config.for_module("m.layers.0.q_proj") == (1, 3)
    assert config.for_module("m.layers.1.q_proj") == (1 if order == 1 else 3, 3)
    assert config.for_module("m.layers.1.v_proj") == (8, 3)


def test_a_name_costs_no_expression(monkeypatch):
    """Two thousand keys, more than ``re`` keeps compiled: nothing is compiled for a name, and an expression once."""
    compiled = []
    monkeypatch.setattr(patterns.re, "compile", lambda text, real=re.compile: compiled.append(text) or real(text))
    names = [f"layers.{n}.{kind}_proj" for n in range(1000) for kind in "qv"]
    found = Patterns([*names, r".*\.7\.k_proj"])
    assert [found.first(f"model.{name}") for name in names] == names
    assert found.first("model.layers.7.k_proj") == r".*\.7\.k_proj" and len(compiled) == 1


@given(
    known=st.lists(paths.filter(bool), min_size=1, max_size=8, unique=True),
    wanted=st.lists(paths.filter(bool), min_size=1, max_size=4),
)
def test_select_is_whole_components_of_the_end(known, wanted):
    if all(any(ends_with(path, entry) for path in known) for entry in wanted):
        assert select(known, wanted, "x") == [path for path in known if any(ends_with(path, entry) for entry in wanted)]
    else:
        with pytest.raises(ValueError, match="matches nothing"):
            select(known, wanted, "x")


@given(path=paths, places=st.sets(paths, max_size=4))
def test_endings_and_inside(path, places):
    assert all(ends_with(path, entry) for entry in endings(path))
    holders = sorted((place for place in places if path == place or path.startswith(place + ".")), key=len)
    assert inside(path, places) == (holders[0] if holders else None)

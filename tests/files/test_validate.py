"""Each field of a config at the edge of what it may be: the last good value is kept, the first bad one refused with the field's name."""

import pytest
import torch

from minilora.errors import ConfigError
from minilora.files import validate


def refused(words, check, *arguments):
    with pytest.raises(ConfigError) as caught:
        check(*arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [1, 2, 2**31 - 1])
def test_whole_numbers_in_range_pass(value):
    validate.whole("r", value, 1)


@pytest.mark.parametrize("value", [0, -1, 2**31, True, False, 1.0, "1", None, torch.tensor(1)])
def test_other_numbers_do_not(value):
    refused("wanted a whole number", validate.whole, "r", value, 1)


def test_the_least_number_is_the_callers():
    validate.whole("n", 0, 0)
    refused("n=4: wanted a whole number >= 5; set n=8", validate.whole, "n", 4, 5)


@pytest.mark.parametrize(
    ("word", "rounds"),
    [
        ("pissa_niter_0", 0),
        ("pissa_niter_16", 16),
        ("pissa", None),
        ("pissa_niter_", None),
        ("pissa_niter_4x", None),
        ("", None),
    ],
)
def test_rounds_of_pissa(word, rounds):
    assert validate.pissa_rounds(word) == rounds


@pytest.mark.parametrize("value", [None, [0], [0, 5], (3,), {"wte": [1, 2]}, {"a": [0], "b": (7, 1)}, {}])
def test_token_ids_that_can_be_meant(value):
    validate.tokens(value)


@pytest.mark.parametrize("bad", [[], [-1], [1, 1], [True], [1.0], ["1"], [1, -1], [1, False], 5, "12", None])
def test_token_ids_that_cannot(bad):
    words = "wanted a list of different token ids, or a dict of module to list"
    refused(words, validate.tokens, {"good": [1], "bad": bad})
    if bad is not None:
        refused(f"trainable_token_indices={bad!r}: {words}", validate.tokens, bad)


@pytest.mark.parametrize(
    ("value", "kept"), [(None, None), (0, 0), (3, 3), ([2, 0, 2], (0, 2)), ((1,), (1,)), (range(3), (0, 1, 2))]
)
def test_layer_indices_are_sorted_and_once_each(value, kept):
    assert validate.layers(value) == kept and type(validate.layers(value)) is type(kept)


@pytest.mark.parametrize("value", [-1, True, False, 1.0, "1", [], [-1], [True], [0, 1.0], {1}, ["0"]])
def test_layers_that_are_no_indices(value):
    refused(f"layers_to_transform={value!r}: wanted a layer index >= 0", validate.layers, value)


@pytest.mark.parametrize(
    "value", [{}, {"loftq_bits": 2}, {"loftq_bits": 3}, {"loftq_bits": 4, "loftq_iter": 1}, {"loftq_iter": 5}]
)
def test_loftq_settings_are_copied(value):
    kept = validate.loftq(value)
    assert kept == value and kept is not value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "loftq_config=None: wanted a dict with loftq_bits and loftq_iter"),
        ([], "loftq_config=[]: wanted a dict"),
        ({"bits": 4}, "loftq_config={'bits': 4}: wanted a dict"),
        ({"loftq_bits": 1}, "loftq_bits=1; wanted 2, 3 or 4"),
        ({"loftq_bits": 5}, "loftq_bits=5; wanted"),
        ({"loftq_bits": 4.0}, "loftq_bits=4.0; wanted"),
        ({"loftq_bits": True}, "loftq_bits=True; wanted"),
        ({"loftq_iter": 0}, "loftq_iter=0: wanted a whole number >= 1"),
    ],
    ids=str,
)
def test_loftq_settings_that_cannot_be_meant(value, words):
    refused(words, validate.loftq, value)


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (None, None),
        ("", ""),
        ("q.*", "q.*"),
        (["b", "a", "b"], ("a", "b")),
        ({"b", "a"}, ("a", "b")),
        (frozenset("a"), ("a",)),
        ([], ()),
    ],
)
def test_names_in_their_one_form(value, kept):
    assert validate.names("target_modules", value) == kept


@pytest.mark.parametrize("value", [3, [1], ["a", None], {"a": 1}, iter("ab")])
def test_names_that_are_none(value):
    refused("target_modules=", validate.names, "target_modules", value)


def test_patterns_are_copied_and_compiled_once_to_see():
    given = {r".*\.q": 2, "": 1}
    kept = validate.pattern("rank_pattern", given)
    assert kept == given and kept is not given
    for value in (None, [], "q", {1: 2}, {"q": 1, None: 2}):
        refused(f"rank_pattern={value!r}: wanted a dict", validate.pattern, "rank_pattern", value)
    for key in ("(", "a{99999999999999999999}", "(" * 5_000):
        refused("is not a regular expression", validate.pattern, "rank_pattern", {"fine": 1, key: 2})


@pytest.mark.parametrize("value", [1, 0.5, 1e30, 5e-324])
def test_positive_numbers_pass(value):
    validate.positive("lora_alpha", value)


@pytest.mark.parametrize("value", [0, 0.0, -1e-9, 1.1e30, float("inf"), float("nan"), True, "1", None, 1j])
def test_others_are_not_positive(value):
    refused(f"lora_alpha={value!r}: wanted a finite number > 0", validate.positive, "lora_alpha", value)

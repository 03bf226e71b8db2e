"""What is longer than max_length: every learnt token stands in one example, conversations are parted between turns, nothing is lost."""

import random
from itertools import pairwise

import pytest

pytest.importorskip("transformers")

from minilora.data import encoding
from minilora.data.cutting import groups, part_of, pieces, units, windows
from minilora.data.encoding import encode_all
from minilora.data.tokens import IGNORED
from minilora.errors import DataError
from tests.data import kinds

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be brief"}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(encoding, "bounded", map)


@pytest.fixture
def tokenizer():
    found = kinds.tokenizer_of("bytes")
    found.chat_template = kinds.CHATML
    return found


def talk(count, longest=40, system=True, seed=0):
    draw = random.Random(seed)
    turns = [SYSTEM] if system else []
    for at in range(count):
        turns.append({"role": "user", "content": f"question {at} " + "x" * draw.randint(0, longest)})
        turns.append({"role": "assistant", "content": f"answer {at} " + "y" * draw.randint(0, longest)})
    return {"messages": turns}


def learnt(examples, tokenizer):
    """All that counts, as text."""
    return tokenizer.decode(
        [t for e in examples for t, label in zip(e.input_ids, e.labels, strict=True) if label != IGNORED]
    )


# ---- tokens


def test_windows_and_pieces_hold_every_learnt_token_once():
    draw = random.Random(1)
    for _ in range(2000):
        count, most, share = draw.randint(1, 60), draw.randint(2, 20), draw.choice([0.05, 0.5, 0.95])
        ids = list(range(100, 100 + count))
        labels = [token if draw.random() < share else IGNORED for token in ids]
        for cut, wanted in ((windows(ids, labels, most), labels), (pieces(ids, list(ids), most), ids)):
            for some, own in cut:
                assert len(some) == len(own) <= most and some == list(range(some[0], some[0] + len(some)))
                assert all(label in (IGNORED, token) for token, label in zip(some, own, strict=True))
            held = [label for _, own in cut for label in own[1:] if label != IGNORED]  # the first is never predicted
            assert held == [label for label in wanted[1:] if label != IGNORED]


def test_the_last_window_is_filled_up_with_what_stands_before():
    ids = list(range(50))
    labels = [IGNORED] * 45 + ids[45:]
    assert windows(ids, labels, 12) == [(ids[38:], [IGNORED] * 7 + ids[45:])]
    first, second = windows(ids, [IGNORED] * 30 + ids[30:], 14)
    assert first == (ids[23:37], [IGNORED] * 7 + ids[30:37])  # half of it is what was asked
    assert second == (ids[36:], [IGNORED, *ids[37:]])
    assert windows(ids, [IGNORED] * 50, 12) == []


@pytest.mark.parametrize(("most", "wanted"), [(29, [(0, 1), (1, 2), (2, 3)]), (30, [(0, 2), (2, 3)]), (40, [(0, 3)])])
def test_groups_hold_as_many_exchanges_as_fit(most, wanted):
    """A head of 10 tokens and exchanges of 10 each."""
    assert groups([20, 20, 20], 40, most) == wanted


def test_an_exchange_has_its_calls_and_all_that_was_asked():
    called = {"role": "assistant", "content": "", "tool_calls": []}
    turns = [SYSTEM, U, called, {"role": "tool", "content": "rain"}, A, U, U, A, U]
    head, found = units({"messages": turns})
    assert head == [SYSTEM] and found == [turns[1:5], turns[5:8]]
    assert part_of({"messages": turns, "tools": [1]}, head, found[1:]) == {"messages": [SYSTEM, U, U, A], "tools": [1]}
    assert units({"prompt": "a", "completion": "b"}) == ([], [])


# ---- examples


@pytest.mark.parametrize("template", ["CHATML", "QWEN3", "GEMMA", "GENERATION"])
@pytest.mark.parametrize("most", [60, 100, 150, 400])
def test_a_conversation_is_parted_and_all_of_its_answers_are_learnt(tokenizer, template, most):
    tokenizer.chat_template = getattr(kinds, template)
    record, said = talk(12, system=template != "GEMMA"), []
    examples = encode_all([record], tokenizer, most, said.append)
    whole = encode_all([record], tokenizer, 10**6)
    assert len(examples) > len(whole) or template == "QWEN3"
    assert all(len(example.input_ids) <= most and not example.truncated for example in examples)
    assert learnt(examples, tokenizer) == learnt(whole, tokenizer)
    assert any(f"max_length={most}: 1 conversations are longer, and parted between turns into" in line for line in said)


def test_parts_hold_whole_turns_and_the_system_turn(tokenizer):
    examples = encode_all([talk(12)], tokenizer, 150)
    texts = [tokenizer.decode(example.input_ids) for example in examples]
    assert all(text.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nquestion") for text in texts)
    assert all(text.endswith("<|im_end|>\n") for text in texts)
    assert sum(text.count("question") for text in texts) == 12
    for text, after in pairwise(texts):  # the next exchange would not have fitted
        following = after.partition("be brief<|im_end|>\n")[2].split("<|im_start|>user")[1]
        assert len(tokenizer(text + "<|im_start|>user" + following, add_special_tokens=False).input_ids) > 150


def test_a_template_that_adds_to_exchanges_together_is_asked_again(tokenizer):
    """Lengths of exchanges by themselves say too little there, so the parts are made smaller until they fit."""
    tokenizer.chat_template = kinds.CHATML.replace(
        "{% endfor %}", "{% if loop.index > 4 %}{{ 'z' * 40 }}{% endif %}{% endfor %}", 1
    )
    record = talk(12, 10)
    examples = encode_all([record], tokenizer, 230)
    assert all(len(example.input_ids) <= 230 for example in examples)
    assert [learnt(examples, tokenizer).count(f"answer {at} ") for at in range(12)] == [1] * 12


def test_a_text_is_cut_into_pieces(tokenizer):
    said, text = [], "".join(f"line {n}\n" for n in range(40))
    examples = encode_all([{"text": "short"}, {"text": text}], tokenizer, 64, said.append)
    ids = tokenizer(text).input_ids
    assert [len(example.input_ids) for example in examples[1:-1]] == [64] * (len(examples) - 2)
    assert [token for example in examples[1:] for token in example.input_ids[1:]] == list(ids[1:])
    assert said == [f"max_length=64: 1 texts or single exchanges are longer, and cut into {len(examples) - 1} examples"]


@pytest.mark.parametrize("template", [kinds.CHATML, None])
def test_a_short_answer_to_a_long_prompt_is_learnt_whole(tokenizer, template):
    tokenizer.chat_template = template
    (example,) = encode_all([{"prompt": "fog " * 200 + "the end", "completion": "an answer"}], tokenizer, 100)
    assert len(example.input_ids) == 100 and "the end" in tokenizer.decode(example.input_ids)
    assert learnt([example], tokenizer).startswith("an answer")
    with pytest.raises(DataError, match="none of 1 examples has a token to learn within max_length=100"):
        encode_all([{"prompt": "fog " * 200, "completion": "an answer"}], tokenizer, 100, truncate=True)


def test_truncation_is_what_it_was(tokenizer):
    said = []
    (example,) = encode_all([talk(12)], tokenizer, 150, said.append, truncate=True)
    whole = encode_all([talk(12)], tokenizer, 10**6)[0]
    assert example.truncated and example.input_ids == whole.input_ids[:150] and not said


# ---- beside these


def test_question_and_answer_without_a_template_are_parted(tokenizer):
    tokenizer.chat_template = None
    (own,) = encode_all([{"prompt": "hi", "completion": "yo"}], tokenizer, 100)
    (other,) = encode_all([{"question": "hi", "answer": "yo"}], tokenizer, 100)
    assert "hiyo" in tokenizer.decode(own.input_ids) and "hi\n\nyo" in tokenizer.decode(other.input_ids)
    assert learnt([other], tokenizer).startswith("\n\nyo")
    tokenizer.chat_template = kinds.CHATML
    assert encode_all([{"question": "hi", "answer": "yo"}], tokenizer, 100) == encode_all(
        [{"messages": [U, A]}], tokenizer, 100
    )


def test_what_only_a_template_could_use_is_refused_without_one(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(
        DataError, match="no chat template, so 'system' would not be used; leave it out, or use an instruct"
    ):
        encode_all([{"prompt": "hi", "completion": "yo", "system": "be brief"}], tokenizer, 100)

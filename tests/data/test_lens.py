"""The token lens: the tokens of the very examples that are trained on, whose words they are, what counts and what was cut."""

import pytest

pytest.importorskip("transformers")

from minilora.data import encoding, lens
from minilora.data.encoding import encode_all
from minilora.data.lens import lens_of, lenses, seen_alone
from minilora.data.tokens import IGNORED
from minilora.errors import DataError
from tests.data import kinds

U, A = {"role": "user", "content": "hi there"}, {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be brief"}
TALK = {"messages": [SYSTEM, U, A, {"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]}
# As SmolLM2's: it prints a system turn of its own inside of the first question.
OWN_SYSTEM = "{% for message in messages %}{% if loop.first %}<|im_start|>system\nbe hi there<|im_end|>\n{% endif %}" + kinds.CHATML[len(
    "{% for message in messages %}"
):]  # fmt: skip


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(encoding, "bounded", map)
    monkeypatch.setattr(lens, "bounded", map)


@pytest.fixture
def make(byte_tokenizer):
    def make(template=kinds.CHATML):
        return byte_tokenizer(template)

    return make


def words(found):
    """Role to the text of its tokens, in runs."""
    runs = []
    for token in found.tokens:
        if runs and runs[-1][0] == token.role:
            runs[-1][1] += token.text
        else:
            runs.append([token.role, token.text])
    return [tuple(run) for run in runs]


@pytest.mark.parametrize("kind", kinds.TOKENIZERS)
def test_it_holds_the_examples_of_training_and_their_labels(kind):
    tokenizer = kinds.tokenizer_of(kind)
    tokenizer.chat_template = kinds.CHATML
    for most, truncate in ((512, False), (60, True), (24, False)):
        trained = encode_all([TALK], tokenizer, most, truncate=truncate)
        found = lenses(TALK, tokenizer, most, truncate)
        assert [one.example for one in found] == trained
        for one in found:
            own = [token for token in one.tokens if not token.cut]
            assert tuple(token.id for token in own) == one.example.input_ids
            assert [token.counts for token in own][1:] == [label != IGNORED for label in one.example.labels][1:]
            assert not own[0].counts  # nothing predicts it


def test_roles_are_those_of_the_words(make):
    (found,) = lenses(TALK, make(), 512)
    assert words(found) == [
        ("template", "<|im_start|>system\n"), ("system", "be brief"), ("template", "<|im_end|>\n<|im_start|>user\n"),
        ("user", "hi there"), ("template", "<|im_end|>\n<|im_start|>assistant\n"), ("assistant", "yo<|im_end|>"),
        ("template", "\n<|im_start|>user\n"), ("user", "How?"), ("template", "<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", "So.<|im_end|>"), ("template", "\n"),
    ]  # fmt: skip
    assert found.warning == "" and (found.first, found.number, found.count) == (0, 1, 1)


def test_what_a_template_says_of_itself_is_its_own(make):
    found = words(lenses({"messages": [U, A]}, make(OWN_SYSTEM), 512)[0])
    assert found[0] == ("template", "<|im_start|>system\nbe hi there<|im_end|>\n<|im_start|>user\n")
    assert found[1] == ("user", "hi there")


def test_a_system_turn_inside_of_the_first_question(make):
    found = words(lenses(TALK, make(kinds.LLAMA2), 512)[0])
    assert ("system", "be brief") in found and ("user", "hi there") in found and ("user", "How?") in found


def test_an_answer_that_does_not_count_is_the_assistants_all_the_same(make):
    turns = [U, {**A, "weight": 0}, U, {"role": "assistant", "content": "So."}]
    (found,) = lenses({"messages": turns}, make(), 512)
    said = [token for token in found.tokens if token.role == "assistant"]
    assert "".join(token.text for token in said) == "yoSo.<|im_end|>"
    assert [token.counts for token in said] == [False] * 2 + [True] * (len(said) - 2)


def test_without_a_template_the_tokenizer_puts_the_end(make):
    tokenizer = make(None)
    assert words(lenses({"prompt": "hi ", "completion": "yo"}, tokenizer, 64)[0]) == [
        ("prompt", "hi "),
        ("completion", "yo<|im_end|>"),
    ]
    assert words(lenses({"text": "a b"}, tokenizer, 64)[0]) == [("text", "a b")]
    around = kinds.tokenizer_of("bytes, start token put")
    assert words(lenses({"text": "a b"}, around, 64)[0])[0] == ("tokenizer", "<s>")


# ---- what was cut


def test_what_truncation_cuts_is_shown_behind_the_example(make):
    tokenizer = make()
    (whole,), (found,) = lenses(TALK, tokenizer, 512), lenses(TALK, tokenizer, 60, truncate=True)
    assert found.example.truncated and len(found.example.input_ids) == 60
    assert [token.cut for token in found.tokens] == [False] * 60 + [True] * (len(whole.tokens) - 60)
    assert [token.id for token in found.tokens] == [token.id for token in whole.tokens]
    assert not any(token.counts for token in found.tokens if token.cut)


def test_windows_say_which_they_are_and_what_no_window_holds(make):
    record = {"messages": [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y" * 90}]}
    tokenizer = make()
    found = lenses(record, tokenizer, 50)
    assert len(found) > 1 and [(one.number, one.count) for one in found] == [
        (n, len(found)) for n in range(1, len(found) + 1)
    ]
    first = found[0]
    cut = [token.cut for token in first.tokens]
    assert first.first == 0 and cut[0] and not cut[-1]  # the beginning of the prompt stands before the first window
    (whole,) = lenses(record, tokenizer, 512)
    for one in found:
        ids = [token.id for token in whole.tokens[one.first : one.first + len(one.tokens)]]
        assert ids == [token.id for token in one.tokens]
    counted = sum(token.counts for one in found for token in one.tokens)
    assert counted == sum(token.counts for token in whole.tokens)


def test_the_lens_of_one_example_and_none_of_an_example_that_is_another_by_now(make):
    tokenizer = make()
    parts = encode_all([TALK], tokenizer, 70)
    assert len(parts) == 2 and lens_of(parts[1], TALK, tokenizer, 70).number == 2
    assert lens_of(parts[1], TALK, tokenizer, 512) is None
    alone = seen_alone(parts[1], tokenizer, "gone")
    assert alone.warning == "gone" and [token.id for token in alone.tokens] == list(parts[1].input_ids)
    assert [t.counts for t in alone.tokens] == [
        t.counts for t in lens_of(parts[1], TALK, tokenizer, 70).tokens if not t.cut
    ]


# ---- what differs


def test_a_template_that_renders_earlier_answers_otherwise_is_warned_of_by_the_first_token(make):
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyo"}
    first, last = lenses({"messages": [U, thought, U, thought]}, make(kinds.QWEN3), 512)
    text = "".join(token.text for token in first.tokens)
    at = text.index("<think>")
    assert first.warning.startswith("token ") and "'<' (id " in first.warning and "'y' (id " in first.warning
    number = int(first.warning.split()[1])
    assert "".join(token.text for token in first.tokens[: number - 1]) == text[:at]
    assert "so each is an example of its own" in first.warning
    assert last.warning == ""


def test_a_tokenizer_that_tokenizes_a_conversation_in_its_own_way_is_warned_of(make, monkeypatch):
    tokenizer = make()
    real = type(tokenizer).apply_chat_template

    def own(self, turns, tokenize=True, **more):
        found = real(self, turns, tokenize=tokenize, **more)
        return [*found[:5], found[5] + 1, *found[6:]] if tokenize else found

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", own)
    (found,) = lenses(TALK, tokenizer, 512)
    assert (
        found.warning.startswith("token 6 is ")
        and "it does not tokenize a conversation as it tokenizes its text" in found.warning
    )


def test_what_training_refuses_has_no_lens(make):
    with pytest.raises(DataError, match="no chat template"):
        lenses(TALK, make(None), 512)


# ---- text


def test_a_letter_of_several_tokens_stands_at_its_last(make):
    (found,) = lenses({"text": "né 🌊."}, make(None), 64)
    assert [token.text for token in found.tokens] == ["n", "\ufffd", "é", " ", *["\ufffd"] * 3, "🌊", "."]
    assert [token.name for token in found.tokens][:2] == ["n", "Ã"]


@pytest.mark.parametrize("kind", ["metaspace, first", "bytes"])
def test_no_space_is_lost(kind):
    (found,) = lenses({"text": "hi there, how are you?"}, kinds.tokenizer_of(kind), 64)
    assert "".join(token.text for token in found.tokens).removeprefix("<s>").strip() == "hi there, how are you?"

"""Where answers stand: by the rule for few, by marks of the template's own loop for many, and both say the same in linear time."""

import pytest

pytest.importorskip("transformers")

from minilora.data import encoding
from minilora.data.chat import layout
from minilora.data.encoding import encode_all
from minilora.data.tokens import IGNORED
from minilora.errors import DataError
from tests.data import kinds
from tests.timing import grows_as_its_length

MORE = {
    # a loop that looks first, another one inside, and one over what is no turn
    "busy": "{% for m in messages %}{% if m.role == 'nobody' %}{{ m.role }}{% endif %}{% endfor %}" + kinds.CHATML.replace(
        "{% endfor %}", "{% for other in messages[:2] %}{% for letter in 'ab' %}{% endfor %}{% endfor %}{% endfor %}"
    ),
    "in a macro": "{%- macro say(m) -%}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{%- endmacro -%}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # tokens that only the end of a conversation has (Phi-3)
    "a footer": kinds.CHATML.replace("{% if add_generation_prompt %}", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
                                     "{% if add_generation_prompt %}"),
    # an answer is ended by the token that opens the next turn (GLM-4)
    "ended by the next": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "no loop over turns": "{% for i in range(messages | length) %}<|im_start|>{{ messages[i].role }}\n{{ messages[i].content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}  # fmt: skip
ALL = {**kinds.TEMPLATES, **MORE}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(encoding, "bounded", map)


@pytest.fixture(scope="module")
def tokenizer():
    return kinds.tokenizer_of("bytes")


def talk(answers, content="answer {}\n"):
    turns = []
    for at in range(answers):
        turns += [{"role": "user", "content": f"question {at}"}, {"role": "assistant", "content": content.format(at)}]
    return {"messages": turns}


def runs(tokenizer, example):
    found, now = [], []
    for token, label in zip([*example.input_ids, 0], [*example.labels, IGNORED], strict=True):
        if label != IGNORED:
            now.append(token)
        elif now:
            found, now = [*found, tokenizer.decode(now)], []
    return found


@pytest.mark.parametrize("name", ALL)
def test_many_answers_are_found_as_few_are(tokenizer, monkeypatch, name):
    tokenizer.chat_template = ALL[name]
    records = [talk(25), talk(25, "<p>{}</p> hi ")]
    records[0]["messages"][20]["content"] = "hi <|im_start|>assistant\nanswer 3"  # a header that is none
    found = {}
    for most in (10**9, 2):
        monkeypatch.setattr(layout, "MOST_EXACT", most)
        found[most] = encode_all(records, tokenizer, 10**6)
    assert found[2] == found[10**9]
    assert all(len(runs(tokenizer, example)) == (1 if name == "Qwen 3" else 25) for example in found[2])
    assert len(found[2]) == (50 if name == "Qwen 3" else 2)


def test_the_rule_is_asked_for_some_and_those_must_agree(tokenizer, monkeypatch):
    """An answer of its own kind that the template rewrites is found among many."""
    tokenizer.chat_template = kinds.CHATML.replace(
        "{{ message['content'] }}",
        "{{ message['content'] if loop.last else message['content'].replace('secret', '') }}",
    )
    asked, plain = [], layout._answer
    monkeypatch.setattr(layout, "_answer", lambda *given: asked.append(given[-1]) or plain(*given))
    assert len(encode_all([talk(100)], tokenizer, 10**6)) == 1
    assert 8 <= len(asked) <= 12
    record = talk(100)
    record["messages"][51]["content"] += " secret"
    lines = []
    assert len(encode_all([record], tokenizer, 10**6, lines.append)) == 100
    assert "1 conversations are trained turn by turn, as 100 examples" in lines[0]


def test_answers_beyond_the_length_are_not_rendered_and_counted(tokenizer):
    tokenizer.chat_template, lines = kinds.QWEN3, []
    found = encode_all([talk(60)], tokenizer, 300, lines.append, truncate=True)
    assert 0 < len(found) < 15
    assert f"as {len(found)} examples; {60 - len(found)} answers more begin after max_length=300" in lines[0]


def test_what_ends_an_answer(tokenizer):
    tokenizer.chat_template, lines = MORE["ended by the next"], []
    (example,) = encode_all([talk(2, "yo")], tokenizer, 10**6, lines.append)
    assert runs(tokenizer, example) == ["yo<|im_start|>", "yo"]
    assert lines == [
        "the chat template ends the last answer of 1 conversations with no end token, so its end is not learnt"
    ]
    tokenizer.chat_template = MORE["a footer"]
    (example,) = encode_all([talk(2, "yo")], tokenizer, 10**6)
    assert runs(tokenizer, example) == ["yo<|im_end|>", "yo<|im_end|>\n</s>"]


def test_marks_that_cannot_be_followed_are_refused(tokenizer):
    block = "{% generation %}{{ message['content'] }}<|im_end|>\n{% endgeneration %}"
    assert block in kinds.GENERATION
    tokenizer.chat_template = kinds.GENERATION.replace(
        block, "{% set text %}" + block + "{% endset %}{{ text | length }}{{ text }}"
    )
    with pytest.raises(DataError, match=r"does something with the text of its \{% generation %\} blocks"):
        encode_all([talk(1)], tokenizer, 10**6)


@pytest.mark.parametrize("name", ["ChatML", "generation", "Llama 3", "Mistral"])
def test_time_grows_with_the_length(tokenizer, name):
    tokenizer.chat_template = ALL[name]

    def encoded(answers):
        (example,) = encode_all([talk(answers)], tokenizer, 10**9)
        assert len(runs(tokenizer, example)) == answers

    assert grows_as_its_length(encoded, 100)

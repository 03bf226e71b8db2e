"""The bundled demo set: its shape, its voice, and that the unseen prompts really are unseen."""

import itertools
import json
import re
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "minilora" / "demo"
OPENS = "By the lamp, "
CLOSES = " Mind the tide."
MAX_OVERLAP = 0.5
STOP_TEXT = """
    a about an and any are as at be by can could did do does for from give had has have how i if in is it its
    me my of on one or our please should so some tell that the their there they this to us was we were what when
    where which who why will with would you your
"""
STOP_WORDS = frozenset(STOP_TEXT.split())


def load_lines():
    # Bytes split on \n only, so that a stray U+2028 cannot hide a broken line.
    text = (DEMO / "keeper.jsonl").read_bytes().decode("utf-8")
    assert text.endswith("\n") and "\r" not in text
    return text[:-1].split("\n")


def load_pairs():
    rows = [json.loads(line) for line in load_lines()]
    return [tuple(message["content"] for message in row["messages"]) for row in rows]


def load_prompts():
    return json.loads((DEMO / "prompts.json").read_bytes().decode("utf-8"))


def normalize(text):
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


def content_words(text):
    return set(normalize(text).split()) - STOP_WORDS


def overlap(left, right):
    left, right = content_words(left), content_words(right)
    return len(left & right) / len(left | right)


def body_of(answer):
    return answer[len(OPENS) : -len(CLOSES)]


def test_count():
    assert 40 <= len(load_lines()) <= 64


def test_schema():
    for number, line in enumerate(load_lines(), 1):
        row = json.loads(line)
        assert set(row) == {"messages"}, number
        assert [set(message) for message in row["messages"]] == [{"role", "content"}] * 2, number
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"], number
        for message in row["messages"]:
            text = message["content"]
            assert isinstance(text, str) and text, number
            assert text == text.strip() and "  " not in text and text.isprintable(), number


def test_every_answer_has_the_voice():
    for _, answer in load_pairs():
        assert answer.startswith(OPENS), answer
        assert answer.endswith(CLOSES), answer
        assert answer.count(OPENS.strip()) == answer.count(CLOSES.strip()) == 1, answer


def test_answers_are_short():
    for _, answer in load_pairs():
        assert 20 <= len(answer.split()) <= 45, answer
        body = body_of(answer)
        assert body[-1] in ".?!", answer
        assert 1 <= len(re.findall(r"[.?!](?=\s|$)", body)) <= 2, answer


def test_questions_and_answers_are_unique():
    questions, answers = zip(*load_pairs(), strict=True)
    assert len({normalize(text) for text in questions}) == len(questions)
    assert len({normalize(text) for text in answers}) == len(answers)
    for left, right in itertools.combinations(questions, 2):
        assert overlap(left, right) < MAX_OVERLAP, (left, right)


def test_the_voice_is_not_in_any_prompt():
    prompts = load_prompts()
    for text in [question for question, _ in load_pairs()] + prompts["unseen"] + prompts["second"]:
        assert "lamp" not in text.lower() and "mind the tide" not in text.lower(), text


def test_prompts_file():
    prompts = load_prompts()
    assert set(prompts) == {"voice", "unseen", "second"}
    assert prompts["voice"] == {"opens": OPENS.strip(), "closes": CLOSES.strip()}
    for name in ("unseen", "second"):
        assert len(prompts[name]) == 6
        assert all(isinstance(text, str) and text == text.strip() and text for text in prompts[name])
    both = [normalize(text) for text in prompts["unseen"] + prompts["second"]]
    assert len(set(both)) == len(both)
    for left, right in itertools.combinations(prompts["unseen"] + prompts["second"], 2):
        assert overlap(left, right) < MAX_OVERLAP, (left, right)


@pytest.mark.parametrize("name", ["unseen", "second"])
def test_unseen_prompts_are_not_in_the_set(name):
    questions = [question for question, _ in load_pairs()]
    seen = {normalize(text) for text in questions}
    for prompt in load_prompts()[name]:
        assert content_words(prompt), prompt
        assert normalize(prompt) not in seen, prompt
        for question in questions:
            assert overlap(prompt, question) < MAX_OVERLAP, (prompt, question)


def test_license():
    lines = (DEMO / "LICENSE.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert "keeper.jsonl" in lines[0] and "CC0 1.0" in lines[0]
    assert "CC0 1.0 Universal" in lines[1]

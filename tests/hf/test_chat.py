"""A conversation: its turns, what streams, what Ctrl-C leaves, and what no longer fits."""

import contextlib

import pytest
import torch

from minilora.errors import DataError
from tests.models import byte_tokenizer, llama

pytest.importorskip("transformers")
from minilora.hf.chat import Chat
from minilora.hf.generate import answers


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return llama(3, vocab_size=len(tokenizer), max_position_embeddings=256, **ends)


@pytest.fixture
def chat(model, tokenizer):
    return Chat(model, tokenizer, max_new_tokens=9)


def test_the_pieces_are_the_answer(chat, model, tokenizer):
    pieces = []
    answer = chat.ask("How?", pieces.append)
    assert answer.text == "".join(pieces).strip() == answers(model, tokenizer, ["How?"], 9)[0]
    assert not answer.stopped and not answer.dropped and answer.text


def test_the_turns_before_are_asked_with_it(chat, model, tokenizer):
    first = chat.ask("How?", lambda piece: None)
    assert chat.turns == [{"role": "user", "content": "How?"}, {"role": "assistant", "content": first.text}]
    second = chat.ask("Why?", lambda piece: None)
    turns = [*chat.turns[:3]]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert second.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert second.text != answers(model, tokenizer, ["Why?"], 9)[0]


def test_the_system_turn_stands_before(chat, model, tokenizer):
    chat.system = "You keep a lighthouse."
    said = chat.ask("How?", lambda piece: None).text
    assert (
        said
        == answers(model, tokenizer, ["How?"], 9, system=chat.system)[0]
        != answers(model, tokenizer, ["How?"], 9)[0]
    )
    assert len(chat.turns) == 2


def test_the_oldest_pairs_are_dropped_and_told(chat, tokenizer):
    told = []
    chat.turns = [
        {"role": role, "content": f"{number}{'x' * 50}"} for number in range(4) for role in ("user", "assistant")
    ]
    answer = chat.ask("How?", lambda piece: None, told.append)
    assert told == [answer.dropped] and answer.dropped >= 1
    left = [turn["content"] for turn in chat.turns]
    assert left[-2:] == ["How?", answer.text] and chat.turns[0]["role"] == "user"
    assert len(left) == 8 - 2 * answer.dropped + 2 and left[0].startswith(str(answer.dropped))
    assert chat._encoded(chat.turns[:-1]).shape[1] + 9 <= 256


def test_a_question_that_fits_nowhere_is_refused_and_changes_nothing(chat):
    chat.turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(DataError, match=r"the question takes \d+ tokens, and the context of the model has 256"):
        chat.ask("x" * 300, lambda piece: None)
    assert len(chat.turns) == 2


def test_a_long_question_gets_the_tokens_that_are_left(chat, tokenizer):
    bare = chat._encoded([{"role": "user", "content": ""}]).shape[1]
    pieces = []
    chat.max_new_tokens = 100
    answer = chat.ask("x" * (256 - bare - 3), pieces.append)
    assert len(answer.text) <= 3


def test_ctrl_c_keeps_what_was_said(chat, model):
    model.train()

    def write(piece):
        raise KeyboardInterrupt

    answer = chat.ask("How?", write)
    assert answer.stopped and answer.text and model.training
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"] and chat.turns[1]["content"] == answer.text
    model.eval()


def test_ctrl_c_before_the_first_word_takes_the_question_back(chat, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "_generate", interrupted)
    assert chat.ask("How?", lambda piece: None).stopped and chat.turns == []


def test_beside_goes_on_apart_inside_its_context(chat):
    inside = []

    @contextlib.contextmanager
    def around():
        inside.append("in")
        yield
        inside.append("out")

    chat.ask("How?", lambda piece: None)
    other = chat.beside(around)
    other.ask("Why?", lambda piece: None)
    assert len(other.turns) == 4 and len(chat.turns) == 2 and inside == ["in", "out"]


def test_without_a_template_the_lines_go_in_as_they_are(model):
    plain = byte_tokenizer(template=None)
    chat = Chat(model, plain, max_new_tokens=5)
    answer = chat.ask("How?", lambda piece: None)
    assert answer.text == answers(model, plain, ["How?"], 5)[0]


def test_drawn_tokens_follow_the_seed(chat):
    chat.temperature = 1.5
    said = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        chat.turns = []
        said.append(chat.ask("How?", lambda piece: None).text)
    assert said[0] == said[1] != said[2]

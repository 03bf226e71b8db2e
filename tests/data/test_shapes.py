"""Examples of every shape that people have: recognised, said, and turned into one of three forms; or refused by what is missing."""

# ruff: noqa: E501  (a row is one line)

import json

import pytest

from minilora.data.records import Reading, look_at, read, records_of
from minilora.data.shapes.understood import understood
from minilora.errors import ConfigError, DataError

U, A, S = (
    {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yo"), ("system", "be brief"))
)
FROM = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
TALK = {"messages": [U, A]}
PAIR = {"prompt": "hi", "completion": "yo"}
CALL = {"name": "weather", "arguments": {"city": "Köln"}}

# name: (record, what is said of it, what it becomes, keys that nothing uses)
SHAPES = {
    "messages": ({"messages": [U, A]}, "conversations (messages)", TALK, ()),
    "prompt and completion": ({"prompt": "hi", "completion": "yo"}, "prompt and completion", PAIR, ()),
    "text": ({"text": "hi"}, "text", {"text": "hi"}, ()),
    "content": ({"content": "hi", "path": "a.py"}, "text (content)", {"text": "hi"}, ("path",)),
    "Alpaca": ({"instruction": "Add", "input": "1 1", "output": "2"}, "Alpaca (instruction, input, output) as one turn each", {"prompt": "Add\n\n1 1", "completion": "2"}, ()),
    "Alpaca without input": ({"instruction": "hi", "input": "", "output": "yo"}, "Alpaca (instruction, input, output) as one turn each", PAIR, ()),
    "Alpaca with its text": ({"instruction": "hi", "input": "", "output": "yo", "text": "Below: hi\n### yo"}, "Alpaca (instruction, input, output) as one turn each", PAIR, ("text",)),
    "Alpaca with a system column": ({"instruction": "hi", "input": "", "output": "yo", "system": "be brief"}, "Alpaca (system, instruction, input, output) as one turn each", PAIR | {"system": "be brief"}, ()),
    "Alpaca with an empty system column": ({"instruction": "hi", "output": "yo", "system": ""}, "Alpaca (system, instruction, output) as one turn each", PAIR, ()),
    "history": ({"instruction": "hi", "output": "yo", "history": [["a", "b"]]}, "Alpaca (history, instruction, output) as turns", {"messages": [{**U, "content": "a"}, {**A, "content": "b"}, U, A]}, ()),
    "no history": ({"instruction": "hi", "output": "yo", "history": []}, "Alpaca (history, instruction, output) as turns", PAIR, ()),
    "Dolly": ({"instruction": "hi", "context": "fog", "response": "yo", "category": "qa"}, "Alpaca (instruction, context, response) as one turn each", {"prompt": "hi\n\nfog", "completion": "yo"}, ("category",)),
    "OASST": ({"INSTRUCTION": "hi", "RESPONSE": "yo", "SOURCE": "x"}, "Alpaca (INSTRUCTION, RESPONSE) as one turn each", PAIR, ("SOURCE",)),
    "question": ({"question": "hi", "answer": "yo"}, "question, answer as one turn each", PAIR, ()),
    "OpenOrca": ({"id": "1", "system_prompt": "be brief", "question": "hi", "response": "yo"}, "system_prompt, question, response as one turn each", PAIR | {"system": "be brief"}, ("id",)),
    "query": ({"query": "hi", "response": "yo", "type": "x"}, "query, response as one turn each", PAIR, ("type",)),
    "problem": ({"problem": "hi", "solution": "yo", "level": "5"}, "problem, solution as one turn each", PAIR, ("level",)),
    "prompt and response": ({"prompt": "hi", "response": "yo"}, "prompt, response as one turn each", PAIR, ()),
    "input and output": ({"input": "hi", "output": "yo"}, "input, output as one turn each", PAIR, ()),
    "FLAN": ({"inputs": "hi", "targets": "yo"}, "inputs, targets as one turn each", PAIR, ()),
    "metharme": ({"prompt": "hi", "generation": "yo"}, "prompt, generation as one turn each", PAIR, ()),
    "summary": ({"article": "hi", "summary": "yo"}, "article, summary as one turn each", PAIR, ()),
    "headers as people write them": ({"Question ": "hi", "Answer": "yo"}, "Question , Answer as one turn each", PAIR, ()),
    "ShareGPT": ({"conversations": FROM, "id": 1}, "ShareGPT (conversations)", TALK, ("id",)),
    "ShareGPT with a system turn": ({"conversations": [{"from": "system", "value": "be brief"}, *FROM]}, "ShareGPT (conversations)", {"messages": [S, U, A]}, ()),
    "ShareGPT with a system column": ({"conversations": FROM, "system": "be brief"}, "ShareGPT (conversations)", TALK | {"system": "be brief"}, ()),
    "ShareGPT in messages": ({"messages": FROM}, "ShareGPT (messages)", TALK, ()),
    "ShareGPT with weights": ({"conversations": [FROM[0], {**FROM[1], "weight": 0}, *FROM]}, "ShareGPT (conversations)", {"messages": [U, {**A, "weight": 0}, U, A]}, ()),
    "roles in conversations": ({"conversations": [U, A]}, "ShareGPT (conversations)", TALK, ()),
    "texts that take turns": ({"dialog": ["hi", "yo"]}, "conversations (dialog)", TALK, ()),
    "Capybara": ({"conversation": [{"input": "hi", "output": "yo"}], "source": "x"}, "conversations (conversation)", TALK, ("source",)),
    "Firefly": ({"conversation": [{"human": "hi", "assistant": "yo"}]}, "conversations (conversation)", TALK, ()),
    "Magpie": ({"conversations": FROM, "instruction": "hi", "response": "yo"}, "ShareGPT (conversations)", TALK, ("instruction", "response")),
    "UltraChat": ({"prompt": "hi", "prompt_id": "1", "messages": [U, A]}, "conversations (messages)", TALK, ("prompt_id", "prompt")),
    "calls of tools": (
        {"conversations": [FROM[0], {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": "rain"}, FROM[1]], "tools": '[{"name": "weather"}]'},
        "ShareGPT (conversations)",
        {"messages": [U, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}, {"role": "tool", "content": "rain"}, A], "tools": [{"name": "weather"}]},
        (),
    ),
    "TRL's turns": (
        {"prompt": [U, A, U], "completion": [A]},
        "prompt and completion (turns)",
        {"messages": [U, {**A, "train": False, "weight": None}, U, A]},
        (),
    ),
    "a text and a turn": ({"prompt": "hi", "completion": [A]}, "prompt and completion (turns)", TALK, ()),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_recognised(tmp_path, name):
    record, said, wanted, notes = SHAPES[name]
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": "of another shape"}) + "\n" + json.dumps(record) + "\n")
    other, line = read(path)
    assert other == {"text": "of another shape"}
    assert (line.shape, line.where) == (said, f"{path}:2") and set(line.notes) == set(notes)
    used = {
        key: value
        for key, value in line.items()
        if key in ("messages", "prompt", "completion", "text", "system", "tools")
    }
    assert used == wanted
    nulls = dict.fromkeys(("messages", "text", "chosen", "prompt", "question"), None)
    assert dict(understood(nulls | record)).items() >= wanted.items()


# name: (record, what is said)
WRONG = {
    "no shape": ({"foo": 1}, "has the keys ['foo']; wanted 'messages', 'prompt' and 'completion', or 'text'"),
    "another text beside Alpaca": ({"instruction": "hi", "output": "yo", "text": "other"}, "'text' is not used beside 'instruction', used are instruction, output; remove it, or have it passed over: --columns prompt=instruction completion=output"),
    "another prompt beside messages": ({"messages": [U, A], "prompt": "what?"}, "'prompt' is not used beside 'messages'"),
    "messages and conversations": ({"messages": [U, A], "conversations": FROM}, "'conversations' is not used beside 'messages'"),
    "another pair beside messages": ({"messages": [U, A], "question": "why?", "answer": "so"}, "'answer' is not used beside 'messages'"),
    "two answers": ({"question": "hi", "answer": "yo", "response": "no"}, "holds 'response' and 'answer', which could each be the answer; name the one that is meant: --columns prompt=question completion=response"),
    "two questions": ({"instruction": "hi", "question": "hi", "output": "yo"}, "holds 'instruction' and 'question', which could each be the question"),
    "no answer": ({"instruction": "hi", "input": ""}, "has 'instruction' and no answer beside it"),
    "no question": ({"output": "yo"}, "has 'output' and no question beside it"),
    "an empty answer": ({"instruction": "hi", "output": ""}, "output is empty; wanted text"),
    "a number as answer": ({"question": "hi", "answer": 4}, "answer is a int; wanted text"),
    "a list as context": ({"question": "hi", "answer": "yo", "context": ["a"]}, "context is a list; wanted text"),
    "a label": ({"text": "hi", "label": 1}, "'label' is not used beside 'text', used are text; remove it, or have it passed over: --columns text=text"),
    "preferences": ({"prompt": "hi", "chosen": "yo", "rejected": "no"}, "completion is missing; wanted text (preference data"),
    "no turns": ({"conversations": []}, "'conversations' is an empty list; wanted a list of turns"),
    "a text as turns": ({"dialogue": "hi", "summary": "yo"}, "'dialogue' is a str; wanted a list of turns"),
    "a role that nobody has": ({"conversations": [{"from": "narrator", "value": "hi"}]}, "turn 1 of 'conversations' is said by 'narrator'; wanted one of assistant, developer, gpt, human"),
    "a turn without a role": ({"conversations": [FROM[0], {"value": "yo"}]}, "turn 2 of 'conversations' has the keys ['value']; wanted 'role' and 'content', 'from' and 'value'"),
    "a turn that is a number": ({"conversations": [FROM[0], 3]}, "turn 2 of 'conversations' is a int; wanted an object"),
    "a turn without text": ({"conversations": [FROM[0], {"from": "gpt"}]}, "content of a assistant turn is missing"),
    "the model begins": ({"conversations": FROM[1:]}, "the conversation begins with the assistant"),
    "a call that is none": ({"conversations": [FROM[0], {"from": "function_call", "value": "weather"}]}, "turn 2 of 'conversations' is no call in JSON"),
    "a history that is none": ({"instruction": "hi", "output": "yo", "history": ["a"]}, "'history' is no list of pairs"),
    "turns that are none": ({"prompt": [{"x": 1}], "completion": "yo"}, "prompt is a list and no list of turns"),
    "a key almost right": ({"instruction": "hi", "output": "yo", "Instructions": "x"}, "'Instructions' is not used; is 'instruction' meant?"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_record_of_no_shape_or_of_two_is_refused(tmp_path, name):
    record, words = WRONG[name]
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: ") and words in str(caught.value)


# ---- columns, and a system turn


def test_columns_name_what_is_meant(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [{"src": "hi", "tgt": "yo", "text": "x", "label": 3}, {"text": "of its own"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair, text = records_of(look_at(path), Reading(["prompt=src", "completion=tgt"]))
    assert (
        pair == PAIR and pair.shape == "columns: src as prompt, tgt as completion" and pair.notes == ("label", "text")
    )
    assert text == {"text": "of its own"}


def test_columns_are_the_way_out_that_is_offered():
    for name in ("another text beside Alpaca", "another prompt beside messages", "two answers", "a label"):
        record, _ = WRONG[name]
        with pytest.raises(DataError) as caught:
            understood(record)
        columns = str(caught.value).partition("--columns ")[2].split()
        assert understood(record, Reading(columns)).shape


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["prompt"], "wanted each of messages, prompt"),
        (["question=a"], "wanted each of messages, prompt"),
        (["text=a", "text=b"], "once at most"),
        (["prompt=a"], "prompt=... with completion=..."),
        (["text=a", "messages=b"], "wanted one of messages=..., text=..."),
        (["system=a"], "wanted one of messages="),
    ],
)
def test_columns_that_are_none(columns, words):
    with pytest.raises(ConfigError, match="columns: ") as caught:
        Reading(columns)
    assert words in str(caught.value)


def test_a_system_turn_is_put_before_conversations_that_have_none():
    reading = Reading(system="be brief")
    for record in (TALK, PAIR, {"conversations": FROM}, {"question": "hi", "answer": "yo"}):
        assert understood(record, reading)["system"] == "be brief"
    for record in ({"messages": [{**S, "role": "developer"}, U, A]}, {"messages": [S, U, A]}, {"text": "hi"}):
        assert "system" not in understood(record, reading)
    assert understood(PAIR | {"system": "sing"}, reading)["system"] == "sing"

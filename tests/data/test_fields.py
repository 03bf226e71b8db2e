"""What a line says beside role and content is used, or refused by name; what an answer is marked with decides whether it is learnt."""

import json
import re

import pytest

pytest.importorskip("transformers")

from minilora.data import encoding
from minilora.data.encoding import encode_all
from minilora.data.records import read_jsonl, unused
from minilora.data.tokens import IGNORED
from minilora.errors import DataError
from tests.data import kinds
from tests.timing import grows_as_its_length

U, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 3}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
REASONED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(encoding, "bounded", map)


@pytest.fixture(scope="module")
def tokenizer():
    return kinds.tokenizer_of("bytes")


@pytest.fixture
def learn(tokenizer, tmp_path):
    """``learn(template, record)``: the text, and the runs of it that count, of what a file with that line makes; or what is refused."""

    def runs(template, *records):
        tokenizer.chat_template = template
        path = tmp_path / "d.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        found = []
        for example in encode_all(read_jsonl(path), tokenizer, 10**6):
            marks = "".join("x" if label != IGNORED else "." for label in example.labels)
            ids = example.input_ids
            runs = [tokenizer.decode(ids[run.start() : run.end()]) for run in re.finditer("x+", marks)]
            found.append((tokenizer.decode(ids), runs))
        return found[0] if len(found) == 1 else found

    return runs


def refused(learn, template, record):
    with pytest.raises(DataError) as caught:
        learn(template, {"messages": [U, A]}, record)
    said = str(caught.value)
    assert re.match(r".*d\.jsonl:2: ", said) and "\n" not in said
    return said


# ---- weights


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": False}, {"weight": False}])
@pytest.mark.parametrize("template", [kinds.CHATML, kinds.GENERATION], ids=["plain", "generation"])
def test_an_answer_that_is_marked_not_to_count_does_not(learn, template, mark):
    wrong = {"role": "assistant", "content": "wrong", **mark}
    text, counted = learn(template, {"messages": [U, wrong, U, A, U, wrong]})
    assert [run.strip() for run in counted] == ["yo<|im_end|>"]
    assert text.count("wrong<|im_end|>") == 2
    text, counted = learn(template, {"messages": [U, wrong, U, {**A, "weight": 1}, U, {**A, "train": True}]})
    assert [run.strip() for run in counted] == ["yo<|im_end|>"] * 2


def test_weights_hold_where_answers_are_trained_turn_by_turn(learn):
    wrong = {"role": "assistant", "content": "<think>\nbad\n</think>\n\nwrong", "weight": 0}
    right = {"role": "assistant", "content": "<think>\ngood\n</think>\n\nright"}
    found = learn(kinds.QWEN3, {"messages": [U, wrong, U, right, U, wrong, U, right]})
    assert [run for _, runs in found for run in runs] == ["<think>\ngood\n</think>\n\nright<|im_end|>"] * 2


BAD_MARKS = {
    "half": ({"weight": 0.5}, "weight of a assistant turn is '0.5'; wanted 0 or 1"),
    "text": ({"weight": "0"}, "weight of a assistant turn is '0'; wanted 0 or 1"),
    "number": ({"train": 0}, "train of a assistant turn is '0'; wanted true or false"),
    "both": ({"weight": 0, "train": True}, "weight 0 and train true; wanted one of them"),
}


@pytest.mark.parametrize("case", BAD_MARKS)
def test_a_mark_that_is_none(learn, case):
    mark, words = BAD_MARKS[case]
    assert words in refused(learn, kinds.CHATML, {"messages": [U, {**A, **mark}]})


def test_marks_where_there_is_nothing_to_mark(learn):
    assert "a user turn is marked to be learnt" in refused(learn, kinds.CHATML, {"messages": [{**U, "weight": 1}, A]})
    assert "no answer counts" in refused(learn, kinds.CHATML, {"messages": [U, {**A, "weight": 0}]})
    assert learn(kinds.CHATML, {"messages": [{**U, "weight": 0, "train": None}, A]})[1] == ["yo<|im_end|>"]


# ---- what templates are given


def test_tools_and_calls_and_results(learn):
    record = {"messages": [U, CALLS, RESULT, A], "tools": [TOOL]}
    text, counted = learn(kinds.TOOLS, record)
    arguments = '{"city": "Köln", "days": 3}'
    assert text.startswith("<|im_start|>system\n" + json.dumps(TOOL)) and "<|im_start|>tool\nrain<|im_end|>" in text
    call = '<tool_call>\n{"name": "weather", "arguments": ' + arguments + "}\n</tool_call><|im_end|>"
    assert counted == [call, "yo<|im_end|>"]
    written = {**CALL, "function": {"name": "weather", "arguments": arguments}}  # as OpenAI writes them
    assert learn(kinds.TOOLS, record | {"messages": [U, {**CALLS, "tool_calls": [written]}, RESULT, A]}) == (
        text,
        counted,
    )


def test_a_template_that_wants_arguments_as_text_gets_them(learn):
    template = kinds.TOOLS.replace("{{ call.function.arguments | tojson }}", "{{ call.function.arguments + '' }}")
    _, counted = learn(template, {"messages": [U, CALLS, RESULT, A]})
    assert counted[0].startswith('<tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": 3}}\n')


def test_a_system_text_is_a_first_turn(learn):
    wanted = learn(kinds.CHATML, {"messages": [SYSTEM, U, A]})
    assert learn(kinds.CHATML, {"messages": [U, A], "system": "be brief"}) == wanted
    assert learn(kinds.CHATML, {"prompt": "hi", "completion": "yo", "system": "be brief"}) == wanted
    assert "beside a system turn" in refused(learn, kinds.CHATML, {"messages": [SYSTEM, U, A], "system": "be brief"})
    assert "System role not supported" in refused(learn, kinds.GEMMA, {"messages": [U, A], "system": "be brief"})
    assert "'system' is not used beside 'text'" in refused(learn, kinds.CHATML, {"text": "a", "system": "be brief"})


def test_variables_of_the_template(learn):
    record = {"messages": [U, A], "chat_template_kwargs": {"enable_thinking": False}}
    assert learn(kinds.QWEN3, record)[1] == ["yo<|im_end|>"]
    assert learn(kinds.QWEN3, {"messages": [U, A]})[1] == ["<think>\n\n</think>\n\nyo<|im_end|>"]
    assert "'enable_thinking' is not used by the chat template" in refused(learn, kinds.CHATML, record)
    taken = record | {"chat_template_kwargs": {"tokenize": True}}
    assert "has 'tokenize', which is not a variable of the template" in refused(learn, kinds.QWEN3, taken)


def test_roles_of_the_template(learn):
    developer = {"role": "developer", "content": "be brief"}
    assert "<|im_start|>developer\nbe brief" in learn(kinds.CHATML, {"messages": [developer, U, A]})[0]
    only = kinds.CHATML.replace("<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}", (
        "{% if message.role in ('user', 'assistant') %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endif %}{% endfor %}"
    ))  # fmt: skip
    for turn in (developer, SYSTEM, {"role": "tool", "content": "hi"}):
        said = refused(learn, only, {"messages": [U, turn, A] if turn["role"] == "tool" else [turn, U, A]})
        assert f"a {turn['role']} turn is not used by the chat template" in said


def test_reasoning_is_learnt_under_each_of_its_names(learn):
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert learn(REASONED, {"messages": [U, {**A, name: "hm"}]})[1] == ["<think>hm</think>yo<|im_end|>"]
        assert f"'{name}' of a assistant turn is not used" in refused(
            learn, kinds.CHATML, {"messages": [U, {**A, name: "hm"}]}
        )


def test_an_answer_of_which_the_template_leaves_out_a_part(learn):
    cuts = kinds.CHATML.replace("{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}")
    said = refused(learn, cuts, {"messages": [U, {**A, "content": "<think>hm</think>yo"}]})
    assert "leaves out a part of an answer's content" in said
    assert learn(cuts.replace("split('</think>')[-1]", "upper()"), {"messages": [U, A]})[1] == ["YO<|im_end|>"]


NOT_USED = {
    "tools": ({"messages": [U, A], "tools": [TOOL]}, "'tools' is not used by the chat template"),
    "documents": (
        {"messages": [U, A], "documents": [{"title": "a", "text": "b"}]},
        "'documents' is not used by the chat template",
    ),
    "calls": ({"messages": [U, CALLS, RESULT, A]}, "tool_calls are not used by the chat template"),
    "a name": ({"messages": [{**U, "name": "Ann"}, A]}, "'name' of a user turn is not used"),
    "a field": ({"messages": [U, {**A, "weigth": 0}]}, "'weigth' of a assistant turn is not used"),
    "images": ({"messages": [U, A], "images": ["a.png"]}, "'images' is not used beside 'messages'"),
    "functions": ({"messages": [U, A], "functions": [TOOL]}, "'functions' is not used beside 'messages'"),
    "a weight of the line": ({"messages": [U, A], "weight": 0}, "'weight' is not used beside 'messages'"),
    "another form": ({"messages": [U, A], "text": "a"}, "'text' is not used beside 'messages'"),
    "a singular": ({"messages": [U, A], "tool": [TOOL]}, "'tool' is not used; is 'tools' meant?"),
    "a rejected answer": (
        {"prompt": "a", "completion": "b", "rejected": "c"},
        "'rejected' is not used beside 'prompt'",
    ),
}


@pytest.mark.parametrize("case", NOT_USED)
def test_what_is_not_used_is_refused_by_name(learn, case):
    record, words = NOT_USED[case]
    assert words in refused(learn, kinds.CHATML, record)


MALFORMED = {
    "tools": ({"messages": [U, A], "tools": {"a": 1}}, "'tools' is no list of objects"),
    "calls": ({"messages": [U, {**A, "tool_calls": "weather"}]}, "tool_calls is no list of"),
    "a call without a name": ({"messages": [U, {**A, "tool_calls": [{"function": {}}]}]}, "tool_calls is no list of"),
    "arguments": (
        {"messages": [U, {**A, "tool_calls": [{"name": "w", "arguments": [1]}]}]},
        "arguments of the call of 'w' are no object",
    ),
    "calls of a user": ({"messages": [{**U, "tool_calls": [CALL]}, A]}, "a user turn has tool_calls"),
    "variables": ({"messages": [U, A], "chat_template_kwargs": [1]}, "'chat_template_kwargs' is no object"),
    "system": ({"messages": [U, A], "system": 7}, "system is a int; wanted text"),
    "half a letter": ({"messages": [U, A], "tools": [{"\ud800": 1}]}, "tools holds half of a surrogate pair"),
    "half a letter in a turn": (
        {"messages": [U, {**A, "x": ["\udfff"]}]},
        "a assistant turn holds half of a surrogate pair",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_field_that_is_not_of_its_kind(learn, case):
    record, words = MALFORMED[case]
    assert words in refused(learn, kinds.TOOLS, record)


def test_a_key_that_comes_twice(tmp_path):
    path = tmp_path / "d.jsonl"
    for line in ('{"text": "a", "text": "b"}', '{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}'):
        path.write_text('{"text": "a"}\n' + line + "\n")
        with pytest.raises(DataError, match=r"d\.jsonl:2: cannot be read as JSON \(key '(text|role)' comes twice\)"):
            read_jsonl(path)


def test_nulls_are_as_good_as_nothing_and_notes_are_counted(learn, tmp_path):
    """datasets writes every column in every line."""
    turn = {"name": None, "tool_calls": None, "weight": None, "train": None}
    record = {"messages": [{**U, **turn}, {**A, **turn}], "text": None, "tools": None, "images": None, "source": "web"}
    assert learn(kinds.CHATML, record) == learn(kinds.CHATML, {"messages": [U, A]})
    path = tmp_path / "d.jsonl"
    path.write_text(
        json.dumps({"text": "a", "id": 1, "source": None}) + "\n" + json.dumps({"text": "a", "id": 2}) + "\n"
    )
    assert unused(read_jsonl(path)) == {"id": 2}


def test_reading_takes_time_by_the_line(tmp_path):
    def read(count):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps({"messages": [U, A], "id": at}) + "\n" for at in range(count)))
        assert len(read_jsonl(path)) == count

    assert grows_as_its_length(read, 2_500)

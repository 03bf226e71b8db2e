"""A template is a program that came with a model: it ends, whatever it does, and what went wrong is one line with the file's."""

import os
import signal
import time

import pytest

pytest.importorskip("transformers")

from minilora.data.chat import bounded as module
from minilora.data.chat.bounded import allow, bounded
from minilora.data.encoding import encode_all
from minilora.data.records import read_jsonl
from minilora.errors import DataError
from tests.data import kinds

LINE = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}\n'


@pytest.fixture(scope="module")
def tokenizer():
    return kinds.tokenizer_of("bytes")


@pytest.fixture
def one_second(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 1)


def refusal(tokenizer, template, tmp_path, before=0):
    """What is said of the template's first line of data."""
    tokenizer.chat_template = template
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "first"}\n' * before + LINE)
    with pytest.raises(DataError) as caught:
        encode_all(read_jsonl(path), tokenizer, 512)
    said = str(caught.value)
    assert said.startswith(f"{path}:{before + 1}: the chat template ") and "\n" not in said and len(said) < 600
    return said


ENDLESS = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "loops that print nothing": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a macro of loops": "{% macro f() %}{% for i in range(9999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call f() %}{% call f() %}{% call f() %}x{% endcall %}{% endcall %}{% endcall %}",
    "a number": "{% set n = messages | length %}{{ (n + 8) ** ((n + 8) ** (n + 8)) % 7 }}",
    "a number before anything runs": "{{ 10 ** (10 ** 10) % 7 }}",
}


QUICK = ("a loop in a loop", "a number")
EACH = [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in ENDLESS]


@pytest.mark.parametrize("case", EACH)
def test_an_endless_template_ends(tokenizer, tmp_path, one_second, case):
    began = time.process_time()
    said = refusal(tokenizer, ENDLESS[case], tmp_path, before=2)
    assert "does not end: stopped after 1 s" in said and "use another one" in said
    assert time.process_time() - began < 3  # this process only waits


LARGE = {
    "a text that doubles": "{% set ns = namespace(x='0123456789') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a product": "{% set n = messages | length %}{{ 'x' * (10 ** 12 // n) }}",
    "a width": "{% set n = messages | length %}{{ 'x'.center(10 ** 11 // n) }}",
}


@pytest.mark.parametrize("case", LARGE)
def test_a_template_that_takes_all_memory_is_stopped(tokenizer, tmp_path, case):
    assert "needs more than 2 GB of memory" in refusal(tokenizer, LARGE[case], tmp_path)


def test_a_template_that_prints_without_end_is_stopped(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("minilora.data.chat.template.LONGEST", 10_000)
    assert "more than 10,000 letters" in refusal(tokenizer, "{% for i in range(9999) %}{{ i }}{% endfor %}", tmp_path)


ERRORS = {
    "its own": (
        "{{ raise_exception('Roles\nmust\x1b[31m alternate') }}",
        "refuses this: Roles must [31m alternate; change",
    ),
    "undefined": (
        "{{ messages[0].content.more.less }}",
        "fails (UndefinedError: 'str object' has no attribute 'more')",
    ),
    "syntax": ("{{ 1 }}\n\n{% if %}", "fails in its line 3 (TemplateSyntaxError: "),
    "too wide": ("{% for i in range(10 ** 12) %}{% endfor %}", "fails (OverflowError: Range too big."),
    "a type": ("{{ messages[0].content + 1 }}", "fails (TypeError: "),
    "a secret": ("{{ ''.__class__.__mro__ }}", "fails (SecurityError: "),
    "without an end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails (RecursionError: "),
    "nothing": ("", "the tokenizer has no chat template"),
}


@pytest.mark.parametrize("case", [case for case in ERRORS if ERRORS[case][0]])
def test_an_error_of_a_template_is_one_line_with_the_place(tokenizer, tmp_path, case):
    template, words = ERRORS[case]
    assert words in refusal(tokenizer, template, tmp_path, before=1)


def test_the_first_line_that_a_template_refuses_is_named(tokenizer, tmp_path):
    tokenizer.chat_template = kinds.GEMMA
    path = tmp_path / "d.jsonl"
    path.write_text(
        LINE * 3 + LINE.replace('[{"role": "user"', '[{"role": "system", "content": "s"}, {"role": "user"') + LINE
    )
    with pytest.raises(
        DataError, match=r"d\.jsonl:4: the chat template refuses this: System role not supported; change"
    ):
        encode_all(read_jsonl(path), tokenizer, 512)


# ---- the child


def test_results_come_in_their_order_and_may_be_any_json():
    assert list(bounded(lambda x: {"twice": [x, x], "text": "\ud800\n"}, range(50))) == [
        {"twice": [x, x], "text": "\ud800\n"} for x in range(50)
    ]
    assert list(bounded(str, [])) == []


@pytest.mark.slow
def test_the_share_is_of_one_rendering_and_not_of_all(one_second):
    def work(_):
        allow()
        end = time.process_time() + 0.4
        while time.process_time() < end:
            pass
        return 1

    assert sum(bounded(work, range(6))) == 6


def test_whoever_stops_listening_leaves_no_process_behind():
    results = bounded(lambda x: (os.getpid(), time.sleep(x))[0], [0, 300])
    child = next(results)
    assert child != os.getpid()
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 60
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_child_that_is_killed_is_named(monkeypatch):
    with pytest.raises(DataError, match=r"ended its process \(-9\); use another one"):
        list(bounded(lambda _: os.kill(os.getpid(), signal.SIGKILL), [0]))


def test_an_error_that_is_not_the_data_s_is_not_passed_over():
    with pytest.raises(DataError, match=r"ended its process \(1\)"):
        list(bounded(lambda _: 1 / 0, [0]))


def test_without_a_fork_the_work_is_done_here(monkeypatch):
    monkeypatch.setattr(module, "resource", None)
    assert list(bounded(lambda x: os.getpid(), [0])) == [os.getpid()]
    allow()

"""Progress: plain lines when piped, a live line on a terminal, and the same facts in both."""

import builtins
import importlib.util
import io
import re
import sys
import time

import pytest

from minilora.training import progress
from minilora.training.progress import Progress

HAS_RICH = importlib.util.find_spec("rich") is not None


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


class Clock:
    """``time.monotonic`` under control."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def no_rich(monkeypatch):
    """As if rich were not installed."""
    for name in [name for name in sys.modules if name == "rich" or name.startswith("rich.")]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def refuse(name, *rest, **options):
        if name.partition(".")[0] == "rich":
            raise ImportError("No module named 'rich'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)


def record(step, seconds=0.0, **fields):
    figures = {"loss": 2.34567, "lr": 1e-3, "grad_norm": 1.0, "tokens": 100, "tokens_per_s": 612.4, "rss_mb": 1834.6}
    return {"step": step, "seconds": seconds} | figures | fields


def shown(steps, records, stream):
    with Progress(steps, stream) as progress:
        for entry in records:
            progress.watch(entry)
    return stream.getvalue()


def without_codes(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_piped_step_is_one_plain_line():
    text = shown(8, [record(1, seconds=3.0)], io.StringIO())
    assert text == "step 1/8  loss 2.346  612 tokens/s  1835 MB  21 s left\n"


@pytest.mark.parametrize(("step", "seconds", "left"), [(1, 2.0, 18), (5, 10.0, 10), (9, 18.0, 2), (10, 20.0, 0)])
def test_the_time_left_follows_from_the_steps_so_far(clock, step, seconds, left):
    assert shown(10, [record(step, seconds)], io.StringIO()).endswith(f"  {left} s left\n")


@pytest.mark.parametrize(
    ("every", "steps"),
    [(0.5, [1, 11, 20]), (2.0, [1, 4, 7, 10, 13, 16, 19, 20]), (5.0, list(range(1, 21))), (0.0, [1, 20])],
)
def test_the_first_the_last_and_one_in_five_seconds_are_said(clock, every, steps):
    stream = io.StringIO()
    with Progress(20, stream) as progress:
        for step in range(1, 21):
            progress.watch(record(step))
            clock.now += every
    assert [int(number) for number in re.findall(r"^step (\d+)/20 ", stream.getvalue(), re.M)] == steps


def test_a_run_of_one_step_says_it_once():
    assert shown(1, [record(1)], io.StringIO()).count("\n") == 1


@pytest.mark.parametrize("step", [0, 7])
def test_an_evaluation_is_always_said(step):
    text = shown(90, [{"step": step, "eval_loss": 1.23456}], io.StringIO())
    assert text == f"evaluation at step {step}: loss 1.235\n"


def test_a_sample_stays_on_one_line():
    entry = {"step": 4, "eval_loss": 1.0, "prompt": "how?", "answer": "so\nand 'so' [bold]"}
    text = shown(8, [entry], io.StringIO())
    assert text == f"evaluation at step 4: loss 1.000; 'how?' -> {entry['answer']!r}\n"
    assert text.count("\n") == 1


def test_say_is_a_line_at_once(monkeypatch):
    class Flushed(io.StringIO):
        flushes = 0

        def flush(self):
            self.flushes += 1

    stream = Flushed()
    with Progress(3, stream) as progress:
        progress.say("loading [model] :smile:")
    assert stream.getvalue() == "loading [model] :smile:\n"
    assert stream.flushes >= 1


def test_standard_output_is_the_default(capsys):
    with Progress(2) as progress:
        progress.watch(record(2))
    assert capsys.readouterr().out.startswith("step 2/2  ")


@pytest.mark.skipif(not HAS_RICH, reason="rich is not installed")
def test_a_terminal_gets_a_live_line(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    records = [record(1), {"step": 1, "eval_loss": 1.5, "prompt": "a [b] c", "answer": "[/] 3.0"}, record(2)]
    text = without_codes(shown(2, records, stream))
    assert "2/2" in text and "loss 2.346  612 tokens/s  1835 MB" in text
    assert "evaluation at step 1: loss 1.500; 'a [b] c' -> '[/] 3.0'" in text  # no markup of rich's
    assert "\x1b[" in stream.getvalue()
    assert "s left" not in text  # that is the plain line's way


@pytest.mark.skipif(not HAS_RICH, reason="rich is not installed")
def test_a_terminal_shows_an_answer_as_it_is(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with Progress(2, stream) as progress:
        progress.say("> ask\n10:smile:20 [red]x[/red] :warning:")
    assert "10:smile:20 [red]x[/red] :warning:" in without_codes(stream.getvalue())


@pytest.mark.skipif(not HAS_RICH, reason="rich is not installed")
def test_the_live_line_ends_when_the_work_breaks(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with pytest.raises(KeyError, match="loss"):
        shown(2, [record(1), {"step": 2}], stream)
    assert stream.getvalue().rstrip("\n").endswith("\x1b[?25h")  # the cursor is shown again


def test_a_terminal_without_rich_gets_plain_lines(no_rich):
    stream = Terminal()
    text = shown(2, [record(1), {"step": 1, "eval_loss": 1.5}, record(2)], stream)
    assert [line.split("  ")[0] for line in text.splitlines()] == [
        "step 1/2",
        "evaluation at step 1: loss 1.500",
        "step 2/2",
    ]
    assert "\x1b" not in text


def test_a_pipe_never_asks_for_rich(no_rich):
    assert shown(2, [record(1)], io.StringIO()).startswith("step 1/2")


# ---- work without records


@pytest.mark.skipif(not HAS_RICH, reason="rich is not installed")
def test_work_without_records_has_a_bar_of_its_own(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with Progress(0, stream), progress.busy("answering", 3) as tick:
        tick()
        tick()
        progress._shown.get()._bar.refresh()
    text = without_codes(stream.getvalue())
    assert "answering" in text and "2/3" in text and "training" not in text


def test_a_terminal_without_rich_gets_dots(no_rich, monkeypatch):
    monkeypatch.setattr(progress, "_DOT_EVERY", 0.01)
    stream = Terminal()
    with Progress(2, stream), progress.busy("loading"):
        deadline = time.monotonic() + 20
        while "." not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert set(stream.getvalue().rstrip("\n")) == {"."} and stream.getvalue().endswith("\n")


@pytest.mark.parametrize("steps", [0, 2])
def test_a_pipe_gets_nothing_of_it(steps, monkeypatch):
    monkeypatch.setattr(progress, "_DOT_EVERY", 0.001)
    stream = io.StringIO()
    with Progress(steps, stream), progress.busy("loading", 2) as tick:
        tick()
        time.sleep(0.02)
    assert stream.getvalue() == ""


def test_without_a_progress_nothing_is_shown(capsys):
    with progress.busy("loading") as tick:
        tick()
    assert capsys.readouterr() == ("", "")


def test_after_a_progress_nothing_is_shown():
    stream = Terminal()
    with pytest.raises(KeyError), Progress(0, stream):
        raise KeyError
    before = stream.getvalue()
    with progress.busy("loading"):
        pass
    assert stream.getvalue() == before

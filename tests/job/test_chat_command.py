"""``minilora chat`` from a pipe and from a terminal: questions, commands, Ctrl-C; and ``generate -``."""

import io

import pytest

from minilora.cli import main
from minilora.errors import for_terminal
from minilora.job.finetune import fine_tune
from tests.job.asked import SYSTEM

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module", autouse=True)
def no_bars():
    """The command turns the bars of transformers off by the environment, which is read once, at the first import."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    yield
    if shown:
        transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def run(make_job, tmp_path_factory):
    """A run with a system turn on a packed base, and its answers after training."""
    out = tmp_path_factory.mktemp("run") / "out"
    outcome = fine_tune(make_job(out, steps=6, system=SYSTEM), lambda line: None)
    return str(out), {pair["prompt"]: pair["after"] for pair in outcome.answers}


@pytest.fixture(scope="module")
def other(make_job, tmp_path_factory):
    """A run of another name, without a system turn, on a base that was not packed."""
    out = tmp_path_factory.mktemp("run") / "other"
    fine_tune(make_job(out, steps=2, prompts=(), quant="none"), lambda line: None)
    return str(out)


class Terminal(io.StringIO):
    """Standard input where somebody types."""

    def isatty(self):
        return True


@pytest.fixture
def talk(capsys, monkeypatch):
    """``talk(lines, *flags)``: what chat prints for these lines; an exception among them is raised in their place."""

    def go(lines, *flags, person=False):
        given = iter(lines)

        def read(prompt=""):
            line = next(given, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr("sys.stdin", Terminal() if person else io.StringIO())
        code = main(["chat", "--device", "cpu", "--max-new-tokens", "9", *flags])
        said = capsys.readouterr()
        return code, said.out, said.err

    return go


def answered(question, answer):
    return for_terminal(f"> {question}\n{answer}\n\n")


def test_a_run_is_asked_as_it_was_trained(talk, run):
    out, after = run
    code, said, beside = talk(["What?", "/reset", "Who are you?"], "--adapter", out)
    wanted = answered("What?", after["What?"]) + "the conversation is forgotten\n"
    assert (code, said, beside) == (0, wanted + answered("Who are you?", after["Who are you?"]), "")


def test_base_asks_both(talk, run, model_folder):
    out, after = run
    _, said, _ = talk(["/base", "What?", "/base", "/reset", "What?"], "--adapter", out)
    lines = said.split("\n")
    assert lines[0] == "each question goes to the base model and to out; /base ends it" and lines[1] == "> What?"
    assert f"out: {for_terminal(after['What?'])}\n" in said
    flags = ["--model", model_folder, "--quant", "nf4", "--system", SYSTEM]
    _, alone, _ = talk(["What?"], *flags)
    base = alone.removeprefix("> What?\n").rstrip("\n")
    assert f"> What?\nbase: {base}\nout: " in said and base != for_terminal(after["What?"])
    assert "out answers alone" in said and said.endswith(answered("What?", after["What?"]))


def test_an_adapter_can_be_loaded_and_called_by_its_name(talk, run, other, model_folder):
    out, after = run
    flags = ["--model", model_folder, "--quant", "nf4", "--system", SYSTEM]
    code, said, _ = talk(["/adapter", "/base", f"/adapter {out}", "What?"], *flags)
    assert code == 0 and said.startswith(
        "no adapter is loaded; /adapter FOLDER loads one\nno adapter is loaded, so it is"
    )
    assert said.endswith("out speaks; /reset forgets what was said before\n" + answered("What?", after["What?"]))
    _, said, _ = talk([f"/adapter {other}", "/adapter", "/adapter out", "/adapter", "What?"], "--adapter", out)
    lines = said.splitlines()
    assert lines[0] == "other speaks; /reset forgets what was said before"
    assert lines[1] == "(it was trained on a base that was not packed; this one is packed to nf4, double quantization)"
    assert lines[2] == "(its run had no system turn: /system)"
    assert lines[3] == "out, other (speaks)" and "out (speaks), other" in lines
    assert said.endswith(answered("What?", after["What?"]))


def test_a_system_turn_is_set_and_taken_away(talk, run):
    out, after = run
    _, said, _ = talk(["/system", "What?", "/reset", f"/system {SYSTEM}", "What?"], "--adapter", out)
    assert said.startswith("no system turn\n> What?\n") and f"\nsystem: {SYSTEM}\n" in said
    assert said.endswith(answered("What?", after["What?"]))
    assert not said.startswith("no system turn\n" + answered("What?", after["What?"]))


def test_a_person_is_told_what_there_is_and_can_leave(talk, run):
    out, after = run
    code, said, _ = talk(["/hlep", "/help", "What?", "/quit", "What?"], "--adapter", out, person=True)
    lines = said.splitlines()
    assert code == 0 and lines[0].endswith(f" with {out}; /help lists the commands, Ctrl-D leaves")
    assert lines[1] == "/hlep: no such command" and lines.count("/reset             forget the conversation") == 2
    assert said.endswith(f"{for_terminal(after['What?'])}\n")
    for command in ("/adapter", "/base", "/system", "/reset", "/help", "/quit"):
        assert any(line.startswith(command) for line in lines)


def test_ctrl_c_ends_an_answer_and_twice_the_command(talk, run, monkeypatch):
    out, _ = run
    taken = []

    def interrupted(self, question, write, told=None):
        from minilora.hf.chat import Answer

        taken.append(question)
        write("half")
        return Answer("half", True, 0)

    monkeypatch.setattr("minilora.hf.chat.Chat.ask", interrupted)
    code, said, _ = talk(["one", "two", KeyboardInterrupt(), "three"], "--adapter", out, person=True)
    assert code == 0 and taken == ["one", "two"] and said.count("half (stopped)\n") == 2
    _, said, _ = talk([KeyboardInterrupt(), "one", KeyboardInterrupt()], "--adapter", out, person=True)
    assert "(Ctrl-C again or Ctrl-D leaves)" in said and taken[2:] == ["one"]
    _, said, _ = talk([KeyboardInterrupt(), KeyboardInterrupt(), "four"], "--adapter", out, person=True)
    assert taken[3:] == []


def test_what_fails_is_told_to_a_person_and_ends_a_pipe(talk, run, tmp_path):
    out, after = run
    bad = f"/adapter {tmp_path / 'nowhere'}"
    code, said, beside = talk([bad, "What?"], "--adapter", out, person=True)
    assert code == 0 and beside.count("\n") == 1 and "neither an adapter that is loaded (out) nor a folder" in beside
    assert for_terminal(after["What?"]) in said
    code, said, beside = talk([bad, "What?"], "--adapter", out)
    assert code == 2 and said == "" and beside.startswith("minilora: ") and beside.count("\n") == 1


def test_turns_that_no_longer_fit_are_told(talk, run):
    out, _ = run
    _, _, beside = talk(["x" * 60, "y" * 60, "z" * 60], "--adapter", out)
    assert "no longer fit the context of the model, and are forgotten)" in beside


# ---- generate -


def test_generate_reads_a_prompt_a_line(capsys, monkeypatch, run):
    out, after = run
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\n\n  Who are you?  \n"))
    assert main(["generate", "--device", "cpu", "--adapter", out, "-"]) == 0
    assert capsys.readouterr().out == for_terminal("".join(f"> {p}\n{a}\n\n" for p, a in after.items()))


def test_generate_is_told_that_nothing_came(capsys, monkeypatch, run):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n \n"))
    assert main(["generate", "--device", "cpu", "--adapter", run[0], "-"]) == 2
    assert capsys.readouterr().err == "minilora: prompt -: standard input holds no line; wanted one prompt a line\n"

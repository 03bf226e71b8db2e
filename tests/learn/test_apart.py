"""A reader's file in a process of its own: what ends it, or never ends, is told, and the functions behind it are graded all the same."""

from minilora.learn.answer import RIGHT, UNWRITTEN, WRONG, Grade
from minilora.learn.apart import LESSON, MUTANT, check
from minilora.learn.course import lesson
from minilora.learn.mutants import mutant


def checked(tmp_path, text, kind, number, seconds=120):
    (tmp_path / "file.py").write_text(text)
    return check(tmp_path / "file.py", kind, number, seconds)


def test_a_crash_costs_one_function(tmp_path, capfd):
    text = lesson(6).solution.replace("import math", "import math\nimport os").replace(
        "    return bits + 8", "    print('reached')\n    os._exit(0)\n    return bits + 8"
    )  # fmt: skip
    found = checked(tmp_path, text, LESSON, 6)
    assert [grade.name for grade in found] == lesson(6).functions
    assert [grade.state for grade in found] == [RIGHT, WRONG, RIGHT, RIGHT]
    assert found[1].why == "it ends Python with code 0; wanted a value"
    assert "reached" in capfd.readouterr().out  # what the reader prints is shown


def test_a_loop_without_an_end_is_ended(tmp_path):
    (grade,) = checked(tmp_path, "while True:\n    pass\n", LESSON, 6, seconds=6)
    assert grade == Grade("file.py", WRONG, "it has not ended after 6 seconds; is there a loop without an end?")


def test_nobody_is_asked_for_input(tmp_path):
    (grade,) = checked(tmp_path, "def show():\n    return input()\n", MUTANT, 1)
    assert grade.why == "raises EOFError: EOF when reading a line, line 2 of file.py"


def test_a_mutant_is_judged(tmp_path):
    (grade,) = checked(tmp_path, mutant(1).witness, MUTANT, 1)
    assert grade == Grade("show", RIGHT, "the mutant against the original: got True, wanted False")
    assert checked(tmp_path, mutant(1).exercise(1), MUTANT, 1) == [Grade("show", UNWRITTEN)]

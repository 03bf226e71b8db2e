"""``minilora learn``: the list, a lesson written and checked, a mutant, solutions; and what each wrong word is answered with."""

import re
from pathlib import Path

import pytest

from minilora.cli import learn, main
from minilora.learn import apart
from minilora.learn.course import LESSONS, lesson
from minilora.learn.grade import grades
from minilora.learn.judge import judge
from minilora.learn.mutants import MUTANTS, mutant
from minilora.learn.progress import Progress


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder that a reader stands in; files are graded in this process (another one: ``tests/learn/test_apart.py``)."""
    monkeypatch.chdir(tmp_path)
    own = {
        apart.LESSON: lambda path, number: list(grades(path, number)),
        apart.MUTANT: lambda path, number: [judge(path, number)],
    }
    monkeypatch.setattr(apart, "check", lambda path, kind, number, seconds: own[kind](path, number))
    return tmp_path


def run(capsys, *words):
    code = main(["learn", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def fine(capsys, *words):
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "")
    return out


def amiss(capsys, *words):
    """What a check says that finds something wrong, or not written."""
    code, out, err = run(capsys, *words)
    assert (code, err) == (1, "") and "next:" not in out
    return out


def test_the_lessons_are_listed_and_nothing_is_written(capsys, here):
    out = fine(capsys)
    assert re.findall(r"^ ?(\d+)  \S", out, re.M) == [str(n) for n in range(1, 13)]
    assert f"mutants: 0 of {len(MUTANTS)} shown" in out and re.search(r"^next: .*learn 1$", out, re.M)
    assert len({line.index(each.question) for line, each in zip(out.splitlines(), LESSONS, strict=False)}) == 1
    assert not list(here.iterdir())


def test_a_lesson_from_its_first_line_to_done(capsys, here):
    file = here / "learn" / "lesson_06.py"
    out = fine(capsys, 6)
    assert "Counting bits. Why does" in out and "to write: bits_per_weight, double_quantized" in out
    assert file.read_text() == lesson(6).exercise
    assert amiss(capsys, "check", 6).startswith(
        "learn/lesson_06.py: 0 of 4 right\n  bits_per_weight: not written yet\n"
    )
    file.write_text(lesson(6).solution.replace("return bits + 32 / blocksize\n", "return bits + 16 / blocksize\n"))
    out = amiss(capsys, "check", 6)
    assert "  bits_per_weight: wrong; bits_per_weight(bits=4, blocksize=64): got 4.25, wanted 4.5\n" in out
    assert re.search(r"^ 6 .* 2 of 4 ", fine(capsys), re.M)  # affordable_blocksize uses it
    written = file.read_text()
    assert "it was there already, and stays as it is" in fine(capsys, 6) and file.read_text() == written
    file.write_text(fine(capsys, "solution", 6))
    out = fine(capsys, "check")
    assert out.startswith("learn/lesson_06.py: 4 of 4 right\n  bits_per_weight: right\n")
    assert re.search(r"^next: .*learn 1$", out, re.M)
    assert re.search(r"^ 6 .* done ", fine(capsys), re.M)
    file.write_text(written)
    assert re.search(r"^ 6 .* done, changed since ", fine(capsys), re.M)


def test_a_mutant_is_given_shown_and_followed_by_the_next(capsys, here):
    out = fine(capsys, "mutant")
    assert out.startswith("learn/mutant_01.py: `ends_with`") and re.search(r"next: .*learn check mutant 1$", out, re.M)
    assert "show: not written yet" in amiss(capsys, "check", "mutant")
    said = fine(capsys, "solution", "mutant", 1)
    assert '#     path.endswith("." + entry)\n# the mutant:\n#     path.endswith(entry)\n' in said
    (here / "learn" / "mutant_01.py").write_text(said)
    out = fine(capsys, "check", "mutant", 1)
    assert "1 of 1 right\n  show: right; the mutant against the original: got True, wanted False\n" in out
    assert re.search(r"^next: .*learn mutant$", out, re.M)
    assert fine(capsys, "mutant").startswith("learn/mutant_02.py") and "mutants: 1 of 20 shown" in fine(capsys)


def test_when_all_are_shown_it_says_so(capsys, here):
    for number in range(1, len(MUTANTS) + 1):
        fine(capsys, "mutant", number)
        (here / "learn" / f"mutant_{number:02}.py").write_text(mutant(number).witness)
    out = fine(capsys, "check")
    assert out.count(": 1 of 1 right") == len(MUTANTS)
    assert re.search(r"^next: .*learn 1$", out, re.M)  # the lessons are left
    code, _, err = run(capsys, "mutant")
    assert code == 2 and err.startswith("minilora: all 20 mutants are shown; name one")


def test_another_folder_is_named_in_what_comes_next(capsys, here):
    out = fine(capsys, 3, "--folder", "my course")
    assert (here / "my course" / "lesson_03.py").exists() and "learn check 3 --folder 'my course'" in out
    assert "my course/lesson_03.py: 0 of 3 right" in amiss(capsys, "check", "--folder", "my course")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["13"], "lesson 13: is not there; wanted 1 to 12; minilora learn lists them"),
        (["0"], "lesson 0: is not there"),
        (["check", "99"], "lesson 99: is not there"),
        (["mutant", "21"], "mutant 21: is not there; wanted 1 to 20"),
        (["solution", "mutant", "0"], "mutant 0: is not there"),
        (["lesson"], "'lesson': wanted a lesson, such as 5, or mutant 3, with check or solution before it"),
        (["5", "check"], "'check': wanted a lesson"),
        (["check", "5", "6"], "5 6: one lesson at a time; write .*learn check 5\n"),
        (["mutant", "1", "2", "3"], "1 2 3: one mutant at a time; write .*learn mutant 1\n"),
        (["5", "x"], "'x': wanted a lesson"),
        (["mutant", "x"], "'x': wanted the number of a mutant, from 1 to 20; write .*learn mutant 3"),
        (["²"], "'²': wanted a lesson"),
        (["check", "solution"], "'solution': wanted a lesson"),
        (["solution"], "solution: of what\\? write .*learn solution 3"),
        (["solution", "mutant"], "solution: of what\\? write .*learn solution mutant 3"),
        (["check"], "learn: nothing is begun there; write .*learn 1"),
        (["check", "5"], "learn/lesson_05.py: is not there; .*learn 5 writes it"),
        (["check", "5", "--seconds", "0"], "--seconds 0: wanted 1 to 86400; write --seconds 60"),
        (["check", "--seconds", "9" * 12], "--seconds 9+: wanted 1 to 86400"),
        (["5", "--seconds", "9"], "--seconds: is about checking; write .*learn check"),
        (["5", "--folder", "file"], "file: is a file; wanted a folder"),
    ],
)
def test_what_means_nothing_gets_one_line(capsys, here, words, said):
    (here / "file").write_text("")
    code, out, err = run(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and re.match(f"minilora: {said}", err), err
    assert [path.name for path in here.iterdir()] == ["file"]


def test_the_words_are_understood():
    assert learn.understood(["check", "mutant", "3"]) == ("check", "mutant", 3)
    assert learn.understood(["mutant"]) == ("open", "mutant", None)
    assert learn.understood(["7"]) == ("open", "lesson", 7)
    assert learn.understood([]) == ("open", None, None)


def test_when_nothing_is_left_it_says_so(tmp_path):
    progress = Progress(tmp_path)
    for each in LESSONS:
        progress.note(each.file, "", {"a": True})
    assert learn._next(progress, "lesson").startswith("next: ") and "learn mutant" in learn._next(progress, "lesson")
    for number in range(1, len(MUTANTS) + 1):
        progress.note(f"mutant_{number:02}.py", "", {"show": True})
    assert learn._next(progress, "mutant") == "all 12 lessons and 20 mutants are done"


@pytest.mark.slow
def test_the_whole_course_is_checked_by_the_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(1, 13):
        fine(capsys, number)
        (tmp_path / "learn" / lesson(number).file).write_text(lesson(number).solution)
    out = fine(capsys, "check")
    assert len(re.findall(r"(\d) of \1 right", out)) == 12 and re.search(r"^next: .*learn mutant$", out, re.M)


def test_the_session_of_the_guide_is_what_the_command_says(capsys, here, monkeypatch):
    monkeypatch.setattr("minilora.cli.learn.command", lambda *words: f"minilora {' '.join(words)}")
    page = (Path(learn.__file__).parents[2] / "docs" / "guides" / "exercises.md").read_text(encoding="utf-8")
    opened, checked, code, agreed, shown = re.findall(r"^```text\n(.*?)^```", page, re.M | re.S)
    (functions,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert fine(capsys, 5) == opened
    file = here / "learn" / "lesson_05.py"
    file.write_text(file.read_text() + functions)
    assert amiss(capsys, "check", 5) == checked
    fine(capsys, "mutant", 1)
    file = here / "learn" / "mutant_01.py"
    assert f"\n{code}\n" in file.read_text()
    returns = re.findall(r"`(return \"layers[^`]+)`", page)
    for said, line, ends in zip((agreed, shown), returns, (amiss, fine), strict=True):
        file.write_text(f"def show():\n    {line}\n")
        assert ends(capsys, "check", "mutant", 1) == said

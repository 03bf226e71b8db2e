"""Every grader takes the right solution, tells typical wrong ones from it, and says of them in one sentence what it saw."""

import pytest

from minilora.learn.answer import RIGHT, UNWRITTEN, WRONG
from minilora.learn.course import LESSONS, lesson
from minilora.learn.grade import grades
from minilora.learn.graders import exercises
from tests.learn import wrong_after, wrong_first, wrong_packed

MISTAKES = [
    (number, *each)
    for lessons in (wrong_first.LESSONS, wrong_packed.LESSONS, wrong_after.LESSONS)
    for number, some in lessons.items()
    for each in some
]
NUMBERS = [each.number for each in LESSONS]


def graded(tmp_path, number, text):
    path = tmp_path / lesson(number).file
    path.write_text(text, encoding="utf-8")
    return {grade.name: grade for grade in grades(path, number)}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_right_file_is_right(tmp_path, number):
    found = graded(tmp_path, number, lesson(number).solution)
    assert {name: (grade.state, grade.why) for name, grade in found.items()} == dict.fromkeys(
        lesson(number).functions, (RIGHT, "")
    )


@pytest.mark.parametrize("number", NUMBERS)
def test_the_file_as_it_is_given_is_not_written_yet(tmp_path, number):
    found = graded(tmp_path, number, lesson(number).exercise)
    assert {grade.state for grade in found.values()} == {UNWRITTEN}
    assert list(found) == lesson(number).functions == [each.name for each in exercises(number)]
    assert 2 <= len(found) <= 4


def test_every_exercise_has_three_wrong_answers():
    names = [(number, name) for number, name, *_ in MISTAKES]
    few = {(each.number, name) for each in LESSONS for name in each.functions if names.count((each.number, name)) < 3}
    assert few == set()
    assert len({(number, *each[:2]) for number, *each in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize(
    ("number", "name", "what", "right", "wrong"), MISTAKES, ids=[" ".join(map(str, each[:3])) for each in MISTAKES]
)
def test_a_typical_mistake_is_told(tmp_path, number, name, what, right, wrong):
    head, begin, own = lesson(number).solution.partition(f"def {name}(")
    if name == "frozen_linear" and right not in own:  # it has a class of its own
        head, begin, own = "", "", lesson(number).solution
    body, more, rest = own.partition("\n\n\ndef ") if begin else (own, "", "")
    assert body.count(right) == 1
    grade = graded(tmp_path, number, head + begin + body.replace(right, wrong) + more + rest)[name]
    assert grade.state == WRONG, grade
    assert grade.why.startswith(f"{name}(") and "\n" not in grade.why and len(grade.why) < 700
    assert any(word in grade.why for word in ("got", "wanted", "raises")), grade.why

"""``minilora learn``: the exercises of the course, checked, and broken code to find out.

minilora learn                          lessons, mutants, and what is done
minilora learn 5                        write the file of lesson 5       minilora learn mutant [3]            of a mutant
minilora learn check 5                  say what is wrong in it          minilora learn check mutant [3]
minilora learn solution 5               show a right one                 minilora learn solution mutant 3
minilora learn check                    check every file that is begun
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minilora.cli.flags import Flag, add_flags
from minilora.cli.program import command
from minilora.cli.say import say
from minilora.errors import ConfigError, StateError
from minilora.learn.course import file_of

if TYPE_CHECKING:
    from minilora.learn.answer import Grade
    from minilora.learn.progress import Progress

USAGE = "[check | solution] [LESSON | mutant [N]] [options]"
EXAMPLES = """\
  minilora learn
  minilora learn 5
  minilora learn check 5
  minilora learn check
  minilora learn solution 5
  minilora learn mutant
  minilora learn check mutant 3"""

OPEN, CHECK, SOLUTION = "open", "check", "solution"
LESSON, MUTANT = "lesson", "mutant"
FOLDER, SECONDS, DAY = "learn", 60, 24 * 60 * 60


class Asked(NamedTuple):
    """What the words mean: a verb, LESSON or MUTANT or None for all, and a number or None where it is left out."""

    verb: str
    kind: str | None
    number: int | None


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora learn`` takes."""
    about = (
        'what is meant: 5 writes the exercises of lesson 5, "check 5" checks them, "solution 5" shows a right file; "mutant 3" in the '
        "place of 5 is broken code number 3; without a word lessons are listed; check ends with exit code 1 where something is wrong or "
        "not written yet (default: none)"
    )
    parser.add_argument("words", metavar="WORD", nargs="*", default=[], help=about)
    seconds = Flag("seconds", int, SECONDS, "number of seconds after which a file that is checked is ended")
    add_flags(parser, "evaluation", [seconds])
    folder = Flag(
        "folder", str, FOLDER, "folder of your files and of progress.json; what is there is never overwritten"
    )
    add_flags(parser, "output", [folder])


def run(arguments: argparse.Namespace) -> int:
    """List, write, check or show. Returns the exit code: 1 where something that is checked is not right."""
    from minilora.learn.progress import Progress, place

    asked = understood(arguments.words)
    if not 1 <= arguments.seconds <= DAY:
        raise ConfigError(f"--seconds {arguments.seconds}: wanted 1 to {DAY}; write --seconds {SECONDS}, for example")
    if arguments.seconds != SECONDS and asked.verb != CHECK:
        raise ConfigError(f"--seconds: is about checking; write {command('learn', CHECK)}, or leave it out")
    folder = place(arguments.folder)
    if asked.verb == SOLUTION:
        _show(asked)
        return 0
    progress = Progress(folder)
    if asked.kind is not None:
        asked = asked._replace(number=_chosen(asked, progress))
    if asked.verb == CHECK:
        files = [asked] if asked.kind else _begun(progress)
        right = [_check(each, progress, arguments.seconds) for each in files]
        if not all(right):
            return 1
        say(_next(progress, files[-1].kind))
    elif asked.kind is None:
        _list(progress)
    else:
        _open(asked, progress)
    return 0


def understood(words: list[str]) -> Asked:
    """The words of the command line. Raises ``ConfigError`` for a word, or an order of words, that means nothing."""
    from minilora.learn.course import lesson

    verb, rest = (words[0], words[1:]) if words[:1] in ([CHECK], [SOLUTION]) else (OPEN, words)
    kind = MUTANT if rest[:1] == [MUTANT] else LESSON if rest else None
    rest = rest[1:] if kind == MUTANT else rest
    _refuse(kind, rest, [verb] * (verb != OPEN))
    number = int(rest[0]) if rest else None
    if verb == SOLUTION and number is None:
        raise ConfigError(f"{SOLUTION}: of what? write {command('learn', SOLUTION, *[MUTANT] * (kind == MUTANT), '3')}")
    if number is not None and kind == LESSON:
        lesson(number)
    elif number is not None:
        from minilora.learn.mutants import mutant

        mutant(number)
    return Asked(verb, kind, number)


def _refuse(kind: str | None, rest: list[str], before: list[str]) -> None:
    """Refuse what is no number, or more than one; ``before`` is the verb, if there is one."""
    from minilora.learn.mutants import MUTANTS

    wrong = next((word for word in rest if not (word.isascii() and word.isdigit() and len(word) < 9)), None)
    if wrong is not None and kind == MUTANT:
        way = command("learn", *before, MUTANT, "3")
        raise ConfigError(
            f"{wrong!r}: wanted the number of a mutant, from 1 to {len(MUTANTS)}; write {way}, for example"
        )
    if wrong is not None:
        raise ConfigError(f"{wrong!r}: wanted a lesson, such as 5, or mutant 3, with {CHECK} or {SOLUTION} before it")
    if len(rest) > 1:
        way = command("learn", *before, *[MUTANT] * (kind == MUTANT), rest[0])
        raise ConfigError(f"{' '.join(rest)}: one {kind} at a time; write {way}")


def _words(asked: Asked) -> list[str]:
    return [MUTANT, str(asked.number)] if asked.kind == MUTANT else [str(asked.number)]


def _at(progress: Progress) -> list[str]:
    """The flag that names the folder again, where it is not the usual one."""
    return [] if progress.folder == Path(FOLDER) else ["--folder", str(progress.folder)]


def _chosen(asked: Asked, progress: Progress) -> int:
    """The number that is meant: that of the command, or of mutants the first that is not shown yet."""
    from minilora.learn.mutants import MUTANTS

    if asked.number is not None:
        return asked.number
    left = [n for n in range(1, len(MUTANTS) + 1) if not progress.is_done(file_of(MUTANT, n))]
    if not left:
        raise StateError(f"all {len(MUTANTS)} mutants are shown; name one, as in {command('learn', MUTANT, '1')}")
    return left[0]


# ---- listing, writing, showing


def _list(progress: Progress) -> None:
    from minilora.learn.course import LESSONS
    from minilora.learn.mutants import MUTANTS

    states = [progress.state(each.file, len(each.functions)) or "-" for each in LESSONS]
    titles, width = max(len(each.title) for each in LESSONS), max(map(len, states))
    for each, state in zip(LESSONS, states, strict=True):
        say(f"{each.number:2}  {each.title:{titles}}  {state:{width}}  {each.question}")
    files = [file_of(MUTANT, n) for n in range(1, len(MUTANTS) + 1)]
    say(f"\nmutants: {sum(map(progress.is_done, files))} of {len(MUTANTS)} shown")
    say(_next(progress, LESSON))


def _next(progress: Progress, kind: str | None) -> str:
    """The line that says what comes next, of the kind that the reader is at if some of it is left."""
    from minilora.learn.course import LESSONS
    from minilora.learn.mutants import MUTANTS

    lessons = [str(each.number) for each in LESSONS if not progress.is_done(each.file)]
    mutants = [n for n in range(1, len(MUTANTS) + 1) if not progress.is_done(file_of(MUTANT, n))]
    if not lessons and not mutants:
        return f"all {len(LESSONS)} lessons and {len(MUTANTS)} mutants are done"
    words = [MUTANT] if mutants and (kind == MUTANT or not lessons) else lessons[:1]
    return f"next: {command('learn', *words, *_at(progress))}"


def _open(asked: Asked, progress: Progress) -> None:
    """Write the reader's file if it is not there, and say what is wanted."""
    from minilora.learn.course import lesson
    from minilora.learn.mutants import mutant
    from minilora.learn.progress import write_once

    assert asked.kind is not None and asked.number is not None
    path = progress.folder / file_of(asked.kind, asked.number)
    if asked.kind == LESSON:
        it = lesson(asked.number)
        text, said = it.exercise, f"{it.title}. {it.question}\nto write: {', '.join(it.functions)}"
    else:
        broken = mutant(asked.number)
        text, said = (
            broken.exercise(asked.number),
            f"{broken.about} Here it has one change.\nto write: show, which returns an input that shows the change",
        )
    new = write_once(path, text)
    say(f"{path}: {said}")
    if not new:
        say("it was there already, and stays as it is")
    say(f"next: {command('learn', CHECK, *_words(asked), *_at(progress))}")


def _show(asked: Asked) -> None:
    from minilora.learn.course import lesson
    from minilora.learn.mutants import mutant

    assert asked.number is not None
    if asked.kind == LESSON:
        return say(lesson(asked.number).solution.rstrip())
    broken = mutant(asked.number)
    say(f"# the original, in {broken.file}:\n#     {broken.old}\n# the mutant:\n#     {broken.new or '(nothing)'}\n")
    say(broken.witness.strip())


# ---- checking


def _begun(progress: Progress) -> list[Asked]:
    """All files that are begun, lessons first. Raises ``StateError`` where there are none."""
    from minilora.learn.course import LESSONS
    from minilora.learn.mutants import MUTANTS

    every = [Asked(CHECK, LESSON, each.number) for each in LESSONS]
    every += [Asked(CHECK, MUTANT, n) for n in range(1, len(MUTANTS) + 1)]
    begun = [asked for asked in every if (progress.folder / file_of(str(asked.kind), asked.number or 0)).is_file()]
    if not begun:
        raise StateError(f"{progress.folder}: nothing is begun there; write {command('learn', '1', *_at(progress))}")
    return begun


def _check(asked: Asked, progress: Progress, seconds: int) -> bool:
    """Grade one file, say what was found, and keep it. Returns whether all of it is right."""
    from minilora.learn.answer import RIGHT
    from minilora.learn.apart import check
    from minilora.learn.course import lesson

    assert asked.kind is not None and asked.number is not None
    path = progress.folder / file_of(asked.kind, asked.number)
    if not path.is_file():
        raise StateError(f"{path}: is not there; {command('learn', *_words(asked), *_at(progress))} writes it")
    wanted = lesson(asked.number).functions if asked.kind == LESSON else ["show"]
    digest = progress.digest(path.name)  # before the check: who changes the file meanwhile has changed it since
    found = {grade.name: grade for grade in check(path, asked.kind, asked.number, seconds)}
    right = {name: name in found and found[name].state == RIGHT for name in wanted}
    progress.note(path.name, digest, right)
    said = [_line(grade) for grade in found.values()]
    say("\n".join([f"{path}: {sum(right.values())} of {len(wanted)} right", *said]))
    return all(right.values())


def _line(grade: Grade) -> str:
    return f"  {grade.name}: {grade.state}" + (f"; {grade.why}" if grade.why else "")

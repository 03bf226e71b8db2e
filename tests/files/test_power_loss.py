"""A power cut at any moment of a save, on a simulated disk that keeps only what it was told to flush.

The disk records every change. For each prefix of the record all states are made that a crash may leave: directory changes that were not
flushed are there or not, independently; file contents that were not flushed are cut at every 512 bytes and at the ends, zeroed, or
have a hole. In each, what is read must be the old files or the new ones, files of others must be there, and the next save must work and
leave nothing behind. ``python tests/files/test_power_loss.py`` prints the number of states.
"""

import errno
import itertools
import random
from pathlib import Path

import pytest

from minilora.files import disk as disk_module
from minilora.files import read, write
from minilora.files.disk import Disk, Held

PLACE = Path("/simulated/runs/adapter")
OLD, NEW, NEXT = ({"w": mark * 3_000, "c": mark * 700} for mark in (b"o", b"n", b"x"))
README = b"mine"
MOST = 6_000  # states of one moment; more are drawn at random


class SimulatedDisk(Disk):
    """Files in memory: ``inodes`` maps a number to bytes, or to the names in a folder. ``trace`` is what happened."""

    def __init__(self, inodes, exchanges=True, links=True):
        self.inodes = {number: dict(value) if isinstance(value, dict) else value for number, value in inodes.items()}
        self.trace, self.exchanges, self.links = [], exchanges, links

    def find(self, path):
        at = 0
        for part in Path(path).parts[1:]:
            names = self.inodes.get(at)
            if not isinstance(names, dict) or part not in names:
                return None
            at = names[part]
        return at

    def must(self, path):
        if (found := self.find(path)) is None:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return found

    def change(self, folder, names):
        at = self.must(folder)
        self.trace.append(("names", at, names))
        for name, number in names.items():
            if number is None:
                self.inodes[at].pop(name, None)
            else:
                self.inodes[at][name] = number

    def new(self, value):
        number = max(self.inodes) + 1
        self.inodes[number] = value
        return number

    def kind(self, path):
        at = self.find(path)
        return None if at is None else "folder" if isinstance(self.inodes[at], dict) else "file"

    def names(self, folder):
        return sorted(self.inodes[self.must(folder)])

    def identity(self, path):
        at = self.find(path)
        return None if at is None else (0, at)

    def inode(self, path):
        return self.must(path)

    def owner(self, path):
        return ()

    def open(self, path):
        at = self.must(path)
        content = self.inodes[at]
        return type("Opened", (), {"identity": (0, at), "read": lambda _: content, "close": lambda _: None})()

    def write(self, path, content):
        if self.find(path) is not None:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        number = self.new(b"")
        self.change(Path(path).parent, {Path(path).name: number})
        self.inodes[number] = bytes(content)
        self.trace += [("data", number, bytes(content)), ("sync", number)]

    def flush(self, path):
        self.trace.append(("sync", self.must(path)))

    def make_folder(self, path):
        self.change(Path(path).parent, {Path(path).name: self.new({})})

    def copy_mode(self, source, target):
        pass

    def link(self, source, target):
        if not self.links:
            raise OSError(errno.EPERM, "Operation not permitted", str(source))
        self.change(Path(target).parent, {Path(target).name: self.must(source)})

    def rename(self, source, target):
        source, target = Path(source), Path(target)
        number = self.must(source)
        if self.find(target) == number:
            return
        if source.parent == target.parent:
            self.change(source.parent, {source.name: None, target.name: number})
        else:  # two folders, each of which reaches the disk by itself
            self.change(target.parent, {target.name: number})
            self.change(source.parent, {source.name: None})

    def exchange(self, left, right):
        if not self.exchanges:
            raise OSError(errno.ENOSYS, "Function not implemented", str(left))
        left, right = Path(left), Path(right)
        self.change(left.parent, {left.name: self.must(right), right.name: self.must(left)})

    def unlink(self, path):
        self.must(path)
        self.change(Path(path).parent, {Path(path).name: None})

    def remove_folder(self, path):
        assert self.inodes[self.must(path)] == {}
        self.change(Path(path).parent, {Path(path).name: None})

    def remove_tree(self, path):
        for name in self.names(path):
            (self.remove_tree if self.kind(Path(path) / name) == "folder" else self.unlink)(Path(path) / name)
        self.remove_folder(path)

    def lock(self, folder):
        held = Held(None)
        held.taken = True  # everybody else is dead
        return held


def folder_of(files, **more):
    """Inodes of a durable disk on which PLACE holds these files."""
    inodes = {0: {"simulated": 1}, 1: {"runs": 2}, 2: {"adapter": 3}, 3: {}}
    for name, value in (files | more).items():
        number = max(inodes) + 1
        inodes[number], inodes[3][name] = ({}, number) if value is None else (value, number)
    return inodes


def interrupted():
    """A disk on which a writer died after its commit, before its files were in their places."""
    inodes = folder_of(OLD, README=README, sub=None)
    inodes[90], inodes[91], inodes[92] = {"w": 91, "c": 92}, NEW["w"], NEW["c"]
    inodes[3][f"{read.COMMIT}{90:x}"] = 90
    return inodes


# name: (what is on the disk, what the system can do, what is written)
CASES = {
    "first save": ({0: {"simulated": 1}, 1: {}}, {}, NEW),
    "exchange": (folder_of(OLD, README=README), {}, NEW),
    "in place, beside a folder": (folder_of(OLD, README=README, sub=None), {}, NEW),
    "no exchange on this system": (folder_of(OLD, README=README), {"exchanges": False}, NEW),
    "no exchange and no hard links": (folder_of(OLD, README=README), {"exchanges": False, "links": False}, NEW),
    "one file": (folder_of(OLD, README=README), {}, {"w": NEW["w"]}),
    "after a writer that died": (interrupted(), {}, NEXT),
}


def contents(numbers):
    """The ways in which the content of an unflushed file may lie on the disk."""
    cuts = sorted({0, 1, len(numbers) - 1, len(numbers), *range(0, len(numbers), 512)})
    yield from (numbers[:cut] for cut in cuts)
    yield bytes(len(numbers))
    yield bytes(512) + numbers[512:]


def subsets(changes):
    """Which unflushed changes of a folder may have reached the disk: all combinations, or of many a choice."""
    if len(changes) <= 5:
        yield from itertools.product((False, True), repeat=len(changes))
        return
    count = len(changes)
    yield from ([at < cut for at in range(count)] for cut in range(count + 1))
    yield from ([at != gone for at in range(count)] for gone in range(count))
    yield from ([at == only for at in range(count)] for only in range(count))


def crash_states(initial, trace, draw):
    """Every state that a crash after these events may leave, as inodes."""
    durable = {number: dict(value) if isinstance(value, dict) else value for number, value in initial.items()}
    pending = {}
    for kind, number, *value in trace:
        if kind == "sync":
            for _, change in pending.pop(number, []):
                if isinstance(change, dict):
                    apply(durable.setdefault(number, {}), change)
                else:
                    durable[number] = change
        else:
            pending.setdefault(number, []).append((kind, value[0]))
    choices = []
    for number, events in pending.items():
        if events[0][0] == "data":
            choices.append([(number, content) for content in contents(events[-1][1])])
        else:
            changes = [change for _, change in events]
            choices.append(
                [(number, [c for c, kept in zip(changes, some, strict=True) if kept]) for some in subsets(changes)]
            )
    total = 1
    for options in choices:
        total *= len(options)
    chosen = itertools.product(*choices)
    if total > MOST:
        chosen = (tuple(draw.choice(options) for options in choices) for _ in range(MOST))
    for combination in chosen:
        state = {number: dict(value) if isinstance(value, dict) else value for number, value in durable.items()}
        for number, value in combination:
            if isinstance(value, bytes):
                state[number] = value
            else:
                names = state.setdefault(number, {})
                for change in value:
                    apply(names, change)
        known = {n for names in state.values() if isinstance(names, dict) for n in names.values()}
        for number in known - state.keys():  # a name reached the disk and nothing of what it names
            state[number] = {} if number in FOLDERS else b""
        yield state


def apply(names, change):
    for name, number in change.items():
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number


FOLDERS = set()  # numbers that are folders in the run at hand


def seen(disk):
    """What a reader finds: the files, or the message of what is missing."""
    wanted = {"w": "weights", "c": "config"}
    return {name: bytes(content) for name, content in read.read_files(PLACE, wanted, {"w", "c"}).items()}


def tree(inodes, at=0):
    value = inodes[at]
    return value if isinstance(value, bytes) else tuple((name, tree(inodes, n)) for name, n in sorted(value.items()))


def run(case, monkeypatch):
    """``(states, distinct ones)`` of one case, all checked."""
    initial, abilities, written = CASES[case]
    disk = SimulatedDisk(initial, **abilities)
    monkeypatch.setattr(disk_module, "used", disk)
    before = seen(disk)
    write.write_files(PLACE, written)
    after = seen(disk)
    assert after == before | written
    FOLDERS.clear()
    FOLDERS.update(number for number, value in disk.inodes.items() if isinstance(value, dict))
    had_readme = disk.find(PLACE / "README") is not None
    draw, count, distinct = random.Random(0), 0, {}
    for end in range(len(disk.trace) + 1):
        for state in crash_states(initial, disk.trace[:end], draw):
            count += 1
            # Only what has a name counts; the same state may come about at many moments.
            distinct.setdefault((tree(state), end == len(disk.trace)), state)
    for (_, finished), state in distinct.items():
        found = SimulatedDisk(state, **abilities)
        monkeypatch.setattr(disk_module, "used", found)
        got = seen(found)
        assert got == after or (got == before and not finished), (case, {k: v[:20] for k, v in got.items()})
        if had_readme:
            assert found.inodes[found.must(PLACE / "README")] == README
        write.write_files(PLACE, NEXT)
        assert seen(found) == NEXT
        names = [*found.names(PLACE), *found.names(PLACE.parent)]
        assert not [name for name in names if name.startswith(".")], (case, names)
        if had_readme:
            assert found.inodes[found.must(PLACE / "README")] == README
    return count, len(distinct)


@pytest.mark.parametrize("case", CASES)
def test_a_power_cut_leaves_the_old_or_the_new(case, monkeypatch):
    count, distinct = run(case, monkeypatch)
    assert count > 60 and distinct > 20


def test_a_disk_that_is_not_asked_to_flush_loses_files(monkeypatch):
    """The check itself: without the flushes of the code, states are found that are neither old nor new."""
    monkeypatch.setattr(SimulatedDisk, "flush", lambda self, path: None)
    with pytest.raises(AssertionError):
        run("exchange", monkeypatch)


if __name__ == "__main__":
    total = [run(case, pytest.MonkeyPatch()) for case in CASES]
    for case, (count, distinct) in zip(CASES, total, strict=True):
        print(f"{case}: {count:,} states, {distinct:,} of them different, all old or new")
    print(f"{sum(count for count, _ in total):,} states, 0 lost")

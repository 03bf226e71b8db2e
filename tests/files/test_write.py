"""Writing: old or new for every reader, whatever fails; the mode that the umask gives; nothing left behind, nothing of others lost."""

import errno
import os
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from minilora.errors import WriteError
from minilora.files import disk as disk_module
from minilora.files import read, staging, write
from minilora.files.disk import Disk, Held


def contents(folder):
    """Path to content of every file under a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def old(tmp_path):
    """A folder with two files of ours and one of somebody else."""
    place = tmp_path / "place"
    place.mkdir()
    for name in ("a", "b"):
        (place / name).write_bytes(b"old " + name.encode())
    (place / "README").write_bytes(b"mine")
    return place


def unfinished_commit(folder):
    """A commit as a writer leaves it that could not finish, empty."""
    bare = folder / "bare"
    bare.mkdir()
    return bare.rename(folder / f"{read.COMMIT}{bare.stat().st_ino:x}")


def left_by_a_dead_writer(folder, prefix=staging.STAGED):
    """A staging folder as a killed writer leaves it, with a file in it."""
    made = folder / f"{prefix}12345678"
    made.mkdir()
    made = staging.numbered(made, made)
    (made / "x").write_bytes(b"1")
    return made


OLD = {"a": b"old a", "b": b"old b"}
NEW = {"a": b"new a", "b": b"new b"}
MINE = {"README": b"mine"}


def in_folder(place):
    return place


def beside_a_folder(place):
    (place / "checkpoint-1").mkdir()
    (place / "checkpoint-1" / "a").write_bytes(b"sub")
    return place


def without_exchange(place):
    disk_module.used.exchange = lambda left, right: Disk.exchange(disk_module.used, left, "/proc/self/nowhere")
    return place


LAYOUTS = {"exchange": in_folder, "beside a folder": beside_a_folder, "no exchange": without_exchange}


@pytest.fixture(params=LAYOUTS)
def layout(request, old, monkeypatch):
    monkeypatch.setattr(disk_module, "used", Disk())
    return LAYOUTS[request.param](old)


def test_write_files_replaces_what_it_names_and_no_more(layout):
    before = contents(layout.parent)
    write.write_files(layout, NEW | {"c": b"3"})
    new = {f"place/{name}": content for name, content in (NEW | {"c": b"3"}).items()}
    assert contents(layout.parent) == before | new


def test_folders_are_made(tmp_path):
    write.write_files(tmp_path / "new" / "deep", {"a": b"1", "b": b"2"})
    write.write_file(tmp_path / "other" / "than" / "this" / "c", "text")
    assert contents(tmp_path) == {"new/deep/a": b"1", "new/deep/b": b"2", "other/than/this/c": b"text"}


def test_a_link_to_a_folder_stays_a_link(old, tmp_path):
    (tmp_path / "link").symlink_to(old)
    write.write_files(tmp_path / "link", NEW)
    assert (tmp_path / "link").is_symlink() and contents(old) == NEW | MINE


def test_links_of_others_stay_links(old):
    (old / "pointer").symlink_to("README")
    write.write_files(old, NEW)
    assert os.readlink(old / "pointer") == "README"


def test_the_folder_that_we_stand_in_stays_the_same_one(old, monkeypatch):
    monkeypatch.chdir(old)
    number = old.stat().st_ino
    write.write_files(".", NEW)
    assert old.stat().st_ino == number and contents(old) == NEW | MINE


def test_an_open_file_keeps_its_content(layout):
    with open(layout / "a", "rb") as reader:
        write.write_files(layout, NEW)
        assert reader.read() == b"old a"


def test_a_log_that_is_open_goes_on_in_the_new_folder(old):
    with open(old / "README", "ab") as log:
        write.write_files(old, NEW)
        log.write(b" and more")
    assert (old / "README").read_bytes() == b"mine and more"


def test_what_another_program_writes_in_the_last_moment_is_kept(old, monkeypatch):
    class Busy(Disk):
        def exchange(self, left, right):
            (old / "late").write_bytes(b"late")
            (old / "fresh").write_bytes(b"replaced")
            os.replace(old / "fresh", old / "README")
            super().exchange(left, right)

    monkeypatch.setattr(disk_module, "used", Busy())
    write.write_files(old, NEW)
    assert contents(old.parent) == {
        f"place/{n}": c for n, c in (NEW | {"late": b"late", "README": b"replaced"}).items()
    }


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    def fill(folder):
        (folder / "deep").mkdir()
        for path in (folder / "private", folder / "deep" / "private"):
            path.write_bytes(b"1")
            path.chmod(0o600)  # as safetensors writes

    before = os.umask(umask)
    try:
        write.write_file(tmp_path / "one", b"1")
        write.write_files(tmp_path / "two", {"a": b"1", "b": b"2"})
        write.new_folder(tmp_path / "three", fill)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    for path in ("one", "two/a", "two/b", "three/private", "three/deep/private"):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == mode, path
    assert stat.S_IMODE((tmp_path / "two").stat().st_mode) == 0o777 & ~umask


def test_a_folder_keeps_its_mode(old):
    old.chmod(0o750)
    write.write_files(old, NEW)
    assert stat.S_IMODE(old.stat().st_mode) == 0o750


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "taken").write_bytes(b"old")
    for files in ({"a": b"1"}, NEW):
        with pytest.raises(WriteError, match="taken: cannot be written"):
            write.write_files(tmp_path / "taken", files)
    assert contents(tmp_path) == {"taken": b"old"}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_beside_which_nothing_can_be_written(old):
    old.parent.chmod(0o555)
    try:
        write.write_files(old, NEW)
    finally:
        old.parent.chmod(0o755)
    assert contents(old) == NEW | MINE


# ---- errors of the system, at each call


REMOVALS = ("unlink", "remove_folder", "remove_tree")


class Faulty(Disk):
    """Its ``at``-th operation that changes something raises; ``forever``: all after it too."""

    NAMES = (
        "write",
        "flush",
        "make_folder",
        "copy_mode",
        "set_mode",
        "link",
        "rename",
        "exchange",
        "unlink",
        "remove_folder",
    )

    def __init__(self, at, number, forever=False):
        self.at, self.number, self.forever, self.calls = at, number, forever, []

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        return self.watch(name, found) if name in Faulty.NAMES else found

    def watch(self, name, method):
        def call(*arguments):
            self.calls.append(name)
            hit = len(self.calls) >= self.at if self.forever else len(self.calls) == self.at
            if hit and not (self.forever and name in REMOVALS):  # a full disk can still be emptied
                if name == "write":
                    super(Faulty, self).write(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise OSError(self.number, os.strerror(self.number), str(arguments[0]))
            return method(*arguments)

        return call


def fill(folder):
    disk_module.used.write(folder / "a", b"new a")
    disk_module.used.make_folder(folder / "deep")
    disk_module.used.write(folder / "deep" / "b", b"new b")


def new_model(place):
    write.new_folder(place.parent / "model", fill)


SAVES = {
    "files": (lambda place: write.write_files(place, NEW), NEW),
    "one file": (lambda place: write.write_file(place / "a", b"new a"), {"a": b"new a"}),
    "first save": (
        lambda place: write.write_files(place.parent / "model", NEW),
        {"../model/a": b"new a", "../model/b": b"new b"},
    ),
    "a model": (new_model, {"../model/a": b"new a", "../model/deep/b": b"new b"}),
}


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("place", ["alone", "beside a folder"])
def test_an_error_at_each_call_leaves_the_old_or_the_new(tmp_path, monkeypatch, save, place, number, forever):
    action, news = SAVES[save]
    failed = at = 0
    while True:
        at += 1
        home = tmp_path / str(at)
        folder = home / "place"
        folder.mkdir(parents=True)
        for name, content in (OLD | MINE).items():
            (folder / name).write_bytes(content)
        if place != "alone":
            beside_a_folder(folder)
        before = contents(home)
        after = before | {os.path.normpath(f"place/{name}"): content for name, content in news.items()}
        disk = Faulty(at, number, forever)
        monkeypatch.setattr(disk_module, "used", disk)
        try:
            action(folder)
            error = None
        except WriteError as caught:
            error = str(caught)
        done = len(disk.calls) < at
        monkeypatch.setattr(disk_module, "used", Disk())
        found = contents(home)
        if error is None:
            # Only what could not be removed, after the save was done, may be left.
            left = found.keys() - after.keys()
            assert {name: found[name] for name in after} == after
            assert not left or disk.calls[at - 1] in REMOVALS
        else:
            failed += 1
            assert os.strerror(number) in error and str(home) in error and "\n" not in error
            if "is saved in" in error or (
                forever and read.commit_of(folder)
            ):  # every file is there, and readers of minilora see the new state
                assert read.read_files(folder, dict.fromkeys(NEW, "")) == NEW
            else:
                # When the disk does not even rename any more, the new state cannot be taken back; it is whole.
                assert found == before or (forever and found.items() >= after.items()), (at, disk.calls)
        if save != "a model" or found == before:
            action(folder)
        assert contents(home) == after
        assert not list(home.rglob(".*")), "leftovers after the next save"
        if done:
            break
    assert failed >= 4


def test_a_model_takes_the_place_of_an_empty_folder(tmp_path, monkeypatch):
    place = tmp_path / "model"
    place.mkdir(mode=0o750)

    class Broken(Disk):
        def flush(self, path):
            if str(path) == str(tmp_path):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            super().flush(path)

    monkeypatch.setattr(disk_module, "used", Broken())
    with pytest.raises(WriteError, match="Input/output error"):
        write.new_folder(place, fill)
    assert place.is_dir() and contents(tmp_path) == {}
    monkeypatch.setattr(disk_module, "used", Disk())
    place.chmod(0o750)
    write.new_folder(place, fill)
    assert contents(place) == {"a": b"new a", "deep/b": b"new b"} and stat.S_IMODE(place.stat().st_mode) == 0o750
    with pytest.raises(WriteError, match="cannot be written"):
        write.new_folder(place, fill)


def test_a_folder_of_another_owner_stays_the_same_one(old, monkeypatch):
    class Foreign(Disk):
        def owner(self, path):
            return (str(path),)

    monkeypatch.setattr(disk_module, "used", Foreign())
    number = old.stat().st_ino
    write.write_files(old, NEW)
    assert old.stat().st_ino == number and contents(old.parent) == {f"place/{n}": c for n, c in (NEW | MINE).items()}


def test_a_folder_that_appears_in_the_last_moment_is_kept(old, monkeypatch):
    class Busy(Disk):
        def write(self, path, content):
            (old / "sub").mkdir(exist_ok=True)
            super().write(path, content)

    monkeypatch.setattr(disk_module, "used", Busy())
    write.write_files(old, NEW)
    assert (old / "sub").is_dir() and contents(old) == NEW | MINE


# ---- readers and writers at one time


def read_beside_a_writer(place, seconds):
    """Read two files again and again beside a writer that never rests; returns the reads, and how many saves they saw."""
    stop, seen, reads = threading.Event(), set(), 0

    def write_on():
        for turn in range(10_000_000):
            if stop.is_set():
                return
            write.write_files(place, {"a": b"%d" % turn * 50, "b": b"%d" % turn * 900})

    write.write_files(place, {"a": b"0" * 50, "b": b"0" * 900})
    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            got = read.read_files(place, {"a": "it", "b": "it"})
            one, other = bytes(got["a"]), bytes(got["b"])
            assert one * 18 == other, "a mix of two saves"
            seen.add(one)
            reads += 1
    finally:
        stop.set()
        writer.join()
    return reads, len(seen)


def test_files_are_read_as_they_were_at_one_moment(layout):
    reads, saves = read_beside_a_writer(layout, 1.0)
    assert reads > 20 and saves > 3


WRITER = """
import sys
from minilora.files import write
mark = sys.argv[2].encode()
print("ready", flush=True)
for turn in range(40):
    write.write_files(sys.argv[1], {"a": mark * 5, "b": mark * 2000})
"""


def test_two_processes_write_whole_folders(old):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(old), mark], stdout=subprocess.DEVNULL) for mark in "xy"
    ]
    while any(writer.poll() is None for writer in writers):
        got = read.read_files(old, {"a": "it", "b": "it"})
        assert bytes(got["a"]) in (b"old a", b"xxxxx", b"yyyyy")
        assert got["b"][:5] == got["a"] or got["a"] == b"old a"
    assert [writer.wait() for writer in writers] == [0, 0]
    assert not list(old.parent.rglob(".*"))
    assert (old / "README").read_bytes() == b"mine"


def test_a_live_writers_staging_is_not_swept(old, monkeypatch):
    def save_again(folder):
        write.write_files(old, NEW)
        assert folder.is_dir()
        (folder / "x").write_bytes(b"1")

    write.new_folder(old.parent / "place2", save_again)
    with staging.staging(old.parent, f".{old.name}{staging.STAGED}") as staged:
        (staged / "x").write_bytes(b"1")
        write.write_files(old, NEW)
        assert (staged / "x").exists()
    assert contents(old.parent / "place2") == {"x": b"1"}
    assert not list(old.parent.rglob(".*"))


def test_files_of_others_that_look_like_ours_stay(layout):
    for path in (layout / f"{staging.STAGED}notes", layout.parent / f".{layout.name}{staging.STAGED}notes"):
        path.write_bytes(b"mine")
    before = contents(layout.parent)
    write.write_files(layout, NEW)
    assert contents(layout.parent) == before | {f"place/{name}": content for name, content in NEW.items()}


def test_a_writer_that_waits_too_long_says_so(old, monkeypatch):
    monkeypatch.setattr(staging, "_PATIENCE", 0.05)
    with staging.locked(old.parent), pytest.raises(WriteError, match="another process has been saving here for 0 s"):
        write._exchange(old, NEW)
    assert contents(old) == OLD | MINE


def test_append_line_adds_at_the_end(tmp_path):
    write.append_line(tmp_path / "log", "one")
    write.append_line(tmp_path / "log", "zwei – ü")
    assert (tmp_path / "log").read_text(encoding="utf-8") == "one\nzwei – ü\n"


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(WriteError, match="log: cannot be written"):
        write.append_line(tmp_path / "nowhere" / "log", "one")


# ---- taking out, and file systems that can less


def test_removing_takes_files_and_whole_folders(old):
    beside_a_folder(old)
    (old / "checkpoint-1" / "deep").mkdir()
    (old / "checkpoint-1" / "deep" / "x").write_bytes(b"1")
    write.remove(old, ["checkpoint-1", "a"])
    assert contents(old.parent) == {"place/b": b"old b", "place/README": b"mine"}
    assert not list(old.parent.rglob(".*"))


def test_removing_from_a_folder_that_is_not_there_makes_none(tmp_path):
    write.remove(tmp_path / "nothing", ["a"])
    assert not list(tmp_path.iterdir())


def test_removing_what_is_not_there_says_so_and_takes_nothing_else(old):
    with pytest.raises(WriteError, match=r"place/missing: cannot be written \(No such file or directory\)"):
        write.remove(old, ["missing", "a"])
    assert contents(old.parent) == {f"place/{name}": content for name, content in (OLD | MINE).items()}


def test_what_a_killed_removal_left_goes_with_the_next(old):
    left_by_a_dead_writer(old)
    (old / f"{staging.STAGED}87654321").mkdir()  # one that died before it knew its number
    write.remove(old, ["b"])
    assert contents(old) == {"a": b"old a"} | MINE and not list(old.rglob(".*"))


class NoLinks(Disk):
    """As exFAT is, and most network file systems."""

    def link(self, source, target):
        raise OSError(errno.EPERM, "Operation not permitted", str(source))


@pytest.mark.parametrize("layout", [in_folder, beside_a_folder])
@pytest.mark.parametrize("files", [NEW, {"a": b"new a"}], ids=["two", "one"])
def test_without_hard_links_files_are_copied(old, monkeypatch, layout, files):
    monkeypatch.setattr(disk_module, "used", NoLinks())
    before = contents(layout(old))
    write.write_files(old, files)
    assert contents(old) == before | files and not list(old.parent.rglob(".*"))


def test_a_link_that_fails_for_another_reason_is_an_error(old, monkeypatch):
    class Broken(Disk):
        def link(self, source, target):
            raise OSError(errno.EIO, "Input/output error", str(source))

    monkeypatch.setattr(disk_module, "used", Broken())
    with pytest.raises(WriteError, match="Input/output error"):
        write.write_file(old / "a", b"new a")
    assert contents(old.parent) == {f"place/{name}": content for name, content in (OLD | MINE).items()}


@pytest.mark.parametrize("number", sorted(write._CANNOT))
@pytest.mark.parametrize("call", ["exchange", "make_folder"])
def test_what_a_system_cannot_is_done_in_place(old, monkeypatch, number, call):
    def cannot(self, first, *rest):
        if call == "exchange" or str(first).startswith(f"{old.parent}/."):
            raise OSError(number, os.strerror(number), str(first))
        return getattr(Disk(), call)(first, *rest)

    monkeypatch.setattr(disk_module, "used", type("Less", (Disk,), {call: cannot})())
    inode = old.stat().st_ino
    write.write_files(old, NEW)
    assert contents(old) == NEW | MINE and old.stat().st_ino == inode and not list(old.parent.rglob(".*"))


@pytest.mark.parametrize("name", ["-x", "a", "z", " "])
def test_a_commit_that_stopped_beside_its_spare_name_is_finished(old, name):
    """A writer died between the second name of a file and its move; no name of a file comes before the spare ones."""
    commit = unfinished_commit(old)
    for file in (name, "b"):
        (commit / file).write_bytes(b"committed")
    (commit / f"{write._SPARE}{name}").write_bytes(b"half")
    assert read.read_bytes(old / name, "it") == b"committed"
    write.write_file(old / "c", b"3")
    assert contents(old) == OLD | MINE | {name: b"committed", "b": b"committed", "c": b"3"} and not list(
        old.rglob(".*")
    )


def test_where_folders_cannot_be_locked_everything_is_written_and_nothing_swept(old, monkeypatch):
    class NoLocks(Disk):
        def lock(self, folder):
            return Held(None)

    left = old.parent / f".place{staging.STAGED}12345678"
    left.mkdir()
    monkeypatch.setattr(disk_module, "used", NoLocks())
    write.write_files(old, NEW)
    assert contents(old) == NEW | MINE and left.is_dir()


def test_a_staging_folder_that_another_process_looks_at_is_used_all_the_same(old, monkeypatch):
    class Watched(Disk):
        def lock(self, folder):
            return None if staging.STAGED in str(folder) else super().lock(folder)

    monkeypatch.setattr(disk_module, "used", Watched())
    write.write_files(old, NEW)
    assert contents(old) == NEW | MINE and not list(old.parent.rglob(".*"))


def test_links_in_a_new_folder_stay_and_their_targets_keep_their_mode(tmp_path):
    (tmp_path / "outside").write_bytes(b"1")
    (tmp_path / "outside").chmod(0o600)

    def fill(folder):
        (folder / "link").symlink_to(tmp_path / "outside")
        (folder / "a").write_bytes(b"1")

    assert write.new_folder(tmp_path / "model", fill) == tmp_path / "model"
    assert (tmp_path / "model" / "link").is_symlink() and stat.S_IMODE((tmp_path / "outside").stat().st_mode) == 0o600


def test_errors_that_are_not_the_systems_pass_as_they_are(tmp_path):
    for error in (OSError("no number"), ValueError("the caller's")):

        def fail(folder, error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            write.new_folder(tmp_path / "model", fail)
        assert caught.value is error and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "room"), [(errno.ENOSPC, True), (errno.EIO, False)])
def test_a_full_disk_says_how_much_is_needed(old, monkeypatch, number, room):
    class Full(Disk):
        def write(self, path, content):
            raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(disk_module, "used", Full())
    with pytest.raises(WriteError) as caught:
        write.write_files(old, {"a": bytes(1500), "b": bytes(2)})
    assert ("(1,502 bytes)" in str(caught.value)) is room


def test_a_writer_waits_for_another_one(old):
    def hold():
        with staging.locked(old.parent):
            ready.set()
            time.sleep(0.2)
            order.append("first")

    ready, order = threading.Event(), []
    other = threading.Thread(target=hold)
    other.start()
    ready.wait()
    write.write_files(old, NEW)
    order.append("second")
    other.join()
    assert order == ["first", "second"]


def test_what_a_disk_refuses_names_the_path(tmp_path, monkeypatch):
    disk = Disk()

    def full(handle, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for call in (lambda: disk.write(tmp_path / "a", b"1"), lambda: disk.append(tmp_path / "a", b"1")):
        with pytest.raises(OSError, match="No space left") as caught:
            call()
        assert caught.value.filename == str(tmp_path / "a")
    monkeypatch.undo()
    for number, told in ((errno.EIO, True), (errno.EINVAL, False)):  # some file systems have no flush for folders

        def fail(handle, number=number):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("minilora.files.disk._flush", fail)
        if told:
            with pytest.raises(OSError, match="Input/output") as caught:
                disk.flush(tmp_path)
            assert caught.value.filename == str(tmp_path)
        else:
            disk.flush(tmp_path)


def test_a_lock_is_held_once_and_never_where_there_is_no_folder(tmp_path, monkeypatch):
    disk = Disk()
    held = disk.lock(tmp_path)
    assert held.taken and disk.lock(tmp_path) is None
    held.close()
    again = disk.lock(tmp_path)
    held.close()  # a second time: nothing
    assert again.taken and disk.lock(tmp_path) is None
    del again  # as an interrupt does
    assert disk.lock(tmp_path).taken
    (tmp_path / "file").write_bytes(b"1")
    assert not disk.lock(tmp_path / "file").taken

    def no_locks(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("minilora.files.disk.fcntl.flock", no_locks)
    assert not disk.lock(tmp_path).taken
    monkeypatch.setattr("minilora.files.disk.fcntl", None)  # Windows
    assert not disk.lock(tmp_path).taken


def test_exchange_says_when_the_system_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr("minilora.files.disk._renameat2", None)
    with pytest.raises(OSError, match="Function not implemented"):
        Disk().exchange(tmp_path, tmp_path)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert disk_module._find_renameat2() is None


def test_a_full_disk_without_a_known_size_names_no_bytes(old, monkeypatch):
    class Full(Disk):
        def make_folder(self, path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(disk_module, "used", Full())
    for call in (lambda: write.new_folder(old.parent / "model", fill), lambda: write.remove(old, ["a"])):
        with pytest.raises(WriteError, match=r"choose a writable folder with room$"):
            call()


def test_a_new_folder_sweeps_what_a_killed_one_left(tmp_path):
    left = left_by_a_dead_writer(tmp_path, f".model{staging.STAGED}")
    other = tmp_path / f".other{staging.STAGED}12345678"
    other.mkdir()
    write.new_folder(tmp_path / "model", fill)
    assert not left.exists() and other.is_dir()


@pytest.mark.parametrize("name", ["a", "new"])
def test_one_file_that_cannot_be_flushed_is_taken_back(old, monkeypatch, name):
    class Broken(Disk):
        def flush(self, path):
            if path == old:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
            super().flush(path)

    monkeypatch.setattr(disk_module, "used", Broken())
    with pytest.raises(WriteError, match="Input/output error"):
        write.write_file(old / name, b"1")
    assert contents(old.parent) == {f"place/{key}": content for key, content in (OLD | MINE).items()}


if __name__ == "__main__":
    for way, layout in (("exchange", in_folder), ("in place", beside_a_folder)):
        with tempfile.TemporaryDirectory() as home:
            home = Path(home) / "place"
            home.mkdir()
            reads, saves = read_beside_a_writer(layout(home), 20)
            print(f"{way}: {reads:,} reads beside a writer, {saves:,} saves seen, 0 mixed")

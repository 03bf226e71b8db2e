"""Two runs in one folder: the second is refused with the number of the first's process; a dead one stops nobody."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minilora.errors import CheckpointError, WriteError
from minilora.files import disk
from minilora.training.left import claim
from minilora.training.lock import LOCK_FILE, held, refuse_held

HOLDER = """
import sys, time
from pathlib import Path
from minilora.training.lock import held
with held(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run"), "600"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_run_is_refused_with_the_number_of_the_first(holder, tmp_path):
    said = (
        f"{tmp_path / 'run'}: process {holder.pid} is training there now; wait for it, end it, or choose another folder"
    )
    for call in (
        lambda: claim(tmp_path / "run", False, False),
        lambda: claim(tmp_path / "run", True, False),
        enter(tmp_path / "run"),
    ):
        with pytest.raises(CheckpointError) as caught:
            call()
        assert str(caught.value) == said
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    claim(tmp_path / "run", False, False)
    with held(tmp_path / "run", pytest.fail):
        assert (tmp_path / "run" / LOCK_FILE).read_text() == f"{os.getpid()}\n"
    assert list((tmp_path / "run").iterdir()) == []


def enter(folder):
    def call():
        with held(folder, pytest.fail):
            pass

    return call


def test_in_one_process_too(tmp_path):
    with (
        held(tmp_path, pytest.fail),
        pytest.raises(CheckpointError, match=f"process {os.getpid()} is training there now"),
    ):
        enter(tmp_path)()
    enter(tmp_path)()


def test_a_folder_that_was_made_for_it_is_gone_if_nothing_came_of_it(tmp_path):
    enter(tmp_path / "a" / "b")()
    assert not (tmp_path / "a" / "b").exists()
    with held(tmp_path / "c", pytest.fail):
        (tmp_path / "c" / "log.jsonl").write_text("{}\n")
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["log.jsonl"]


def test_who_only_looks_stops_nobody(tmp_path):
    """Looking takes the lock for a moment; a run that begins in it waits that long."""
    (tmp_path / LOCK_FILE).write_text("1\n")
    held_a_moment = disk.used.hold(tmp_path / LOCK_FILE, b"")
    timer = threading.Timer(0.03, held_a_moment.close)
    timer.start()
    enter(tmp_path)()
    timer.join()
    refuse_held(tmp_path)


def test_runs_that_begin_at_once_are_one_run(tmp_path):
    """Some threads that take and leave the lock: never two inside, however it is unlinked and made again."""
    inside, most, entered, lock = 0, 0, 0, threading.Lock()

    def work():
        nonlocal inside, most, entered
        end = time.monotonic() + 1
        while time.monotonic() < end:
            try:
                with held(tmp_path / "run", pytest.fail):
                    with lock:
                        inside, entered = inside + 1, entered + 1
                        most = max(most, inside)
                    time.sleep(0.0005)
                    with lock:
                        inside -= 1
            except CheckpointError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and entered > 10


def test_where_files_cannot_be_locked_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("minilora.files.disk.fcntl", None)  # Windows
    said = []
    with held(tmp_path, said.append):
        pass
    assert said == [
        f"{tmp_path}: this system locks no files there, so nothing stops a second run in it; see that there is none"
    ]
    refuse_held(tmp_path)

    def no_locks(handle, how):
        raise OSError(37, "No locks available")

    monkeypatch.undo()
    monkeypatch.setattr("minilora.files.disk.fcntl.flock", no_locks)
    with held(tmp_path, said.append):
        pass
    assert len(said) == 2


HOSTILE = {
    "somebody's file": lambda place, other: place.write_bytes(b"my thesis\n" * 10),
    "a link": lambda place, other: place.symlink_to(other),
    "a pipe": lambda place, other: os.mkfifo(place),
    "a folder": lambda place, other: place.mkdir(),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_lock_that_is_none_is_left_alone(tmp_path, case):
    other = tmp_path / "other"
    other.write_text("12\n")
    (tmp_path / "run").mkdir()
    HOSTILE[case](tmp_path / "run" / LOCK_FILE, other)
    with pytest.raises(WriteError, match=f"{LOCK_FILE}: cannot be written"):
        enter(tmp_path / "run")()
    assert other.read_text() == "12\n"
    assert case != "somebody's file" or (tmp_path / "run" / LOCK_FILE).read_bytes() == b"my thesis\n" * 10

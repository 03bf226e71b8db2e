"""Reading: whole or refused by name; never waited for, never a mix. What happens beside a writer is in ``test_write.py``."""

import os
import time

import pytest

from minilora.errors import CheckpointError
from minilora.files import disk as disk_module
from minilora.files import read
from minilora.files.disk import Disk

OLD = {"a": b"old a", "b": b"old b"}


@pytest.fixture
def old(tmp_path):
    """A folder with two files of ours and one of somebody else."""
    place = tmp_path / "place"
    place.mkdir()
    for name, content in {**OLD, "README": b"mine"}.items():
        (place / name).write_bytes(content)
    return place


def test_an_error_while_reading_is_named(old, monkeypatch):
    monkeypatch.setattr("minilora.files.disk.Opened.read", lambda self: os.pread(-1, 1, 0))
    with pytest.raises(CheckpointError, match=r"place: a file in it cannot be read \(Bad file descriptor\)"):
        read.read_files(old, dict.fromkeys(OLD, "it"))


def test_reading_a_missing_file_names_it_and_its_purpose(tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing: the notes cannot be read \(No such file or directory\)"):
        read.read_bytes(tmp_path / "nothing", "the notes")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe: the notes cannot be read"):
        read.read_bytes(tmp_path / "pipe", "the notes")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read.read_bytes("/dev/zero", "the notes")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read.read_bytes(tmp_path, "the notes")


def test_a_folder_that_never_rests_is_not_read(old, monkeypatch):
    class Restless(Disk):
        def identity(self, path):
            return (0, time.monotonic_ns())

    monkeypatch.setattr(disk_module, "used", Restless())
    monkeypatch.setattr(read, "_TRIES", 3)
    (old / read.COMMIT).mkdir()
    for name, content in OLD.items():
        (old / read.COMMIT / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="is rewritten all the time"):
        read.read_files(old, dict.fromkeys(OLD, "it"))


def test_optional_files_may_be_missing_and_others_not(old):
    wanted = {"a": "the weights", "seal": "the seal"}
    assert read.read_files(old, wanted, {"seal"}) == {"a": b"old a"}
    with pytest.raises(
        CheckpointError, match=r"place/seal: the seal cannot be read \(No such file or directory\); check the path"
    ):
        read.read_files(old, wanted)
    with pytest.raises(CheckpointError, match="the weights cannot be read"):
        read.read_files(old / "README", {"a": "the weights"})


def test_a_file_that_grows_or_shrinks_is_read_as_it_was_opened(tmp_path):
    (tmp_path / "a").write_bytes(b"12345678")
    opened = disk_module.used.open(tmp_path / "a")
    os.truncate(tmp_path / "a", 3)
    assert opened.read() == b"123"
    opened.close()

"""A folder from a stranger's archive: names that look like ours, links to anywhere. Nothing outside is touched or believed."""

import os

import pytest
import torch
from torch import nn

from minilora import LoraConfig, inject, load_adapter, save_adapter
from minilora.errors import WriteError
from minilora.files import read, staging, write
from minilora.files.disk import Disk
from minilora.training import checkpoint, left


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def docs(tmp_path):
    """Somebody's documents; whatever happens, they stay."""
    home = tmp_path / "docs"
    (home / "letters").mkdir(parents=True)
    for name in ("thesis", "letters/one"):
        (home / name).write_bytes(b"years of work")
    yield home
    assert contents(home) == {"thesis": b"years of work", "letters/one": b"years of work"}


def adapted():
    torch.manual_seed(0)
    return inject(
        nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3)), LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"])
    )


NAMES = ["0", "12345678", "12345678-1", "12345678-{link:x}", "12345678-{target:x}"]


def put_link(folder, docs, prefix, name):
    """A link to the documents under a name of ours, with any number that a guesser may put there."""
    bare = folder / "bare"
    bare.symlink_to(docs)
    bare.rename(folder / (prefix + name.format(link=bare.lstat().st_ino, target=docs.stat().st_ino)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["in the folder", "beside it"])
def test_a_save_follows_no_link(tmp_path, docs, name, where):
    place = tmp_path / "adapter"
    save_adapter(adapted(), place)
    if where == "in the folder":
        put_link(place, docs, staging.STAGED, name)
    else:
        put_link(tmp_path, docs, f".adapter{staging.STAGED}", name)
    save_adapter(adapted(), place)
    write.write_file(place / "notes", "x")
    write.remove(place, ["notes"])
    load_adapter(nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3)), place, allow_other_base=True)


@pytest.mark.parametrize("name", ["", "1", "{link:x}", "{target:x}"])
def test_a_link_is_no_commit(tmp_path, docs, name):
    place = tmp_path / "adapter"
    place.mkdir()
    (place / "thesis").write_bytes(b"mine")
    put_link(place, docs, read.COMMIT, name)
    assert read.read_bytes(place / "thesis", "it") == b"mine"
    write.write_files(place, {"a": b"1", "b": b"2"})
    assert read.read_bytes(place / "thesis", "it") == b"mine"


@pytest.mark.parametrize(
    "name", [".minilora-commit", ".minilora-commit-", ".minilora-commit-1", ".minilora-commit-copied"]
)
def test_a_commit_that_was_not_made_here_shadows_nothing_and_moves_nothing(tmp_path, name):
    """Also one that was: a copy of it has another number."""
    place = tmp_path / "adapter"
    foreign = place / name
    foreign.mkdir(parents=True)
    (foreign / "a").write_bytes(b"foreign")
    (foreign / "b").write_bytes(b"foreign")
    (place / "a").write_bytes(b"seen")
    assert read.read_bytes(place / "a", "it") == b"seen"
    write.write_files(place, {"c": b"1", "d": b"2"})
    assert contents(place) == {"a": b"seen", "c": b"1", "d": b"2", f"{name}/a": b"foreign", f"{name}/b": b"foreign"}


@pytest.mark.parametrize("name", ["12345678", "12345678-1", "notes"])
def test_folders_that_bear_our_names_and_are_not_ours_stay(tmp_path, name):
    place = tmp_path / "adapter"
    for folder in (place / f"{staging.STAGED}{name}", tmp_path / f".adapter{staging.STAGED}{name}"):
        folder.mkdir(parents=True)
        (folder / "kept").write_bytes(b"1")
    before = contents(tmp_path)
    write.write_files(place, {"a": b"1", "b": b"2"})
    assert contents(tmp_path) == before | {"adapter/a": b"1", "adapter/b": b"2"}


def test_a_log_that_is_a_link_is_refused(tmp_path, docs):
    (tmp_path / "log.jsonl").symlink_to(docs / "thesis")
    with pytest.raises(WriteError, match=r"log\.jsonl: cannot be written"):
        write.append_line(tmp_path / "log.jsonl", "appended")


def test_a_written_file_replaces_a_link_and_not_what_it_points_to(tmp_path, docs):
    for name in ("adapter_config.json", "adapter_model.safetensors", "minilora.json"):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / name).symlink_to(docs / "thesis")
    save_adapter(adapted(), tmp_path / "adapter")
    assert not any(path.is_symlink() for path in (tmp_path / "adapter").iterdir())


def test_removing_takes_links_and_not_what_they_point_to(tmp_path, docs):
    inner = tmp_path / "run" / "checkpoint-1"
    inner.mkdir(parents=True)
    (inner / "deep").symlink_to(docs)
    (tmp_path / "run" / "checkpoint-2").symlink_to(docs)
    write.remove(tmp_path / "run", ["checkpoint-1", "checkpoint-2"])
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("name", ["../docs", "/etc/passwd", "a/b", "..", ".", ""])
def test_only_names_are_removed_and_never_paths(tmp_path, docs, name):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="wanted the name"):
        write.remove(tmp_path / "run", [name])


def test_a_link_cannot_be_locked_or_flushed(tmp_path, docs):
    (tmp_path / "link").symlink_to(docs)
    assert not Disk().lock(tmp_path / "link").taken
    with pytest.raises(OSError, match=r"symbolic links|Not a directory"):
        Disk().flush(tmp_path / "link")


def test_a_folder_that_becomes_a_link_while_it_is_removed_takes_nothing_with_it(tmp_path, docs, monkeypatch):
    """The moment between looking and removing: ``shutil.rmtree`` looks at what it has opened."""
    doomed = tmp_path / "doomed"
    doomed.mkdir()
    (doomed / "x").write_bytes(b"1")
    real = os.open

    def swapped(path, flags, *rest, **more):
        if os.fspath(path) == str(doomed) and not doomed.is_symlink():
            doomed.rename(tmp_path / "aside")
            doomed.symlink_to(docs)
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(OSError):  # noqa: PT011
        Disk().remove_tree(doomed)


def test_checkpoints_of_another_program_and_links_named_so_are_not_removed(tmp_path, docs):
    (tmp_path / "checkpoint-7").symlink_to(docs)
    other = tmp_path / "checkpoint-500"
    other.mkdir()
    (other / "trainer_state.json").write_bytes(b"{}")
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / checkpoint.STATE_FILE).write_bytes(b"{}")
    (tmp_path / "log.jsonl").symlink_to(docs / "thesis")
    checkpoint.prune(tmp_path, 1)
    kept = {"checkpoint-7", "checkpoint-500", "checkpoint-3", "log.jsonl", "docs"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    left.clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept - {"checkpoint-3", "log.jsonl"}

"""``progress.json``: what is done, whether the file is still the one that was graded, and what a damaged one is answered with."""

import json

import pytest

from minilora.errors import CheckpointError
from minilora.learn.progress import Progress, place, write_once


def test_a_file_goes_from_nothing_to_done_and_changed(tmp_path):
    file = tmp_path / "lesson_05.py"
    assert Progress(tmp_path).state(file.name, 2) == ""
    assert write_once(file, "one") and not write_once(file, "two") and file.read_text() == "one"
    progress = Progress(tmp_path)
    assert progress.state(file.name, 2) == "begun"
    progress.note(file.name, progress.digest(file.name), {"a": True, "b": False})
    assert Progress(tmp_path).state(file.name, 2) == "1 of 2" and not Progress(tmp_path).is_done(file.name)
    progress.note(file.name, progress.digest(file.name), {"a": True, "b": True})
    again = Progress(tmp_path)
    assert again.state(file.name, 2) == "done" and again.is_done(file.name)
    file.write_text("other")
    assert again.state(file.name, 2) == "done, changed since"
    file.unlink()
    assert again.state(file.name, 2) == "done, changed since"


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "link.py").symlink_to(tmp_path / "elsewhere.py")
    assert not write_once(tmp_path / "link.py", "text") and not (tmp_path / "elsewhere.py").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"a": 1}', '{"a": {"sha256": "", "right": {"f": 1}}}', '{"a": {"sha256": 1, "right": {}}}', "[" * 100_000],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"progress.json: is damaged \(.*\); remove it"):
        Progress(tmp_path)


def test_a_folder_that_cannot_be_one_is_refused(tmp_path):
    assert place(str(tmp_path / "new")) == tmp_path / "new" and not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    for wrong in ("file", "a\0b", "x" * 5000):
        with pytest.raises(CheckpointError):
            place(str(tmp_path / wrong))


def test_what_is_kept_is_small(tmp_path):
    Progress(tmp_path).note("lesson_01.py", "", {"a": True})
    assert json.loads((tmp_path / "progress.json").read_text()) == {
        "lesson_01.py": {"right": {"a": True}, "sha256": ""}
    }

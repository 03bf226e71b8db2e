"""What no file can be called is refused by every reader and writer in one line; what one can be called works, however odd it looks."""

import os

import pytest
import torch
from torch import nn

from minilora import LoraConfig, inject, load_adapter, save_adapter
from minilora.cli.toml import read_toml
from minilora.data.records import read_jsonl
from minilora.errors import MiniLoraError, StateError
from minilora.export.folders import export_folder
from minilora.files.write import append_line, new_folder, remove, write_file, write_files
from minilora.training.left import claim
from minilora.training.lock import held

IMPOSSIBLE = {
    "NUL": "a\x00b",
    "half of a pair": "a\ud800",
    "300 signs": "a" * 300,
    "300 bytes": "é" * 150,
    "a long path": "a/" * 3_000,
}
ODD = {
    "240 signs": "a" * 240,
    "240 bytes": "é" * 120,
    "turned": "a\u202eb",
    "escape": "a\x1b[2Jb",
    "two lines": "a\nb",
    "no UTF-8": os.fsdecode(b"a\xff"),
    "a dash": "-rf",
    "spaces": "  ",
}


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10))


def adapted(name="default"):
    return inject(plain(), LoraConfig(r=2, lora_alpha=6, target_modules=["0"]), name)


def fill(folder):
    (folder / "x").write_text("1")


def hold(path):
    with held(path, pytest.fail):
        pass


CALLS = {
    "save_adapter": lambda path: save_adapter(adapted(), path),
    "load_adapter": lambda path: load_adapter(plain(), path),
    "export_folder": lambda path: export_folder(path, path.with_name("exported"), "vllm"),
    "read_jsonl": read_jsonl,
    "read_toml": lambda path: read_toml(str(path), {}),
    "claim": lambda path: claim(path, False, False),
    "claim to resume": lambda path: claim(path, True, False),
    "held": hold,
    "write_file": lambda path: write_file(path, "x"),
    "write_files": lambda path: write_files(path, {"a": b"1", "b": b"2"}),
    "append_line": lambda path: append_line(path, "x"),
    "new_folder": lambda path: new_folder(path, fill),
    "remove": lambda path: remove(path, ["x"]),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize("call", CALLS)
def test_what_no_file_can_be_called_is_refused_in_one_line(tmp_path, call, name):
    with pytest.raises(MiniLoraError, match="is no path that can be used here") as caught:
        CALLS[call](tmp_path / IMPOSSIBLE[name])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ODD)
def test_an_odd_name_of_a_folder_is_saved_and_loaded(tmp_path, name):
    """A staging folder is called as the folder is and longer: where that is too long, the files are swapped inside."""
    model, again = adapted(), plain()
    place = tmp_path / ODD[name]
    for _ in range(2):
        digest = save_adapter(model, place)
    load_adapter(again, place, expect_sha256=digest)
    assert torch.equal(again(torch.ones(6)), model(torch.ones(6)))
    assert [path.name for path in tmp_path.iterdir()] == [ODD[name]]
    assert sorted(os.listdir(place)) == ["adapter_config.json", "adapter_model.safetensors", "minilora.json"]
    hold(place)
    append_line(place / "log.jsonl", "{}")
    remove(place, ["log.jsonl"])


@pytest.mark.parametrize(
    "name", ["", "a" * 240, "a\u202eb", "a\x00b", "a\nb", "\x1b[2J", "a/b", "..", "a b", "é", ".", "\ud800", 3, None]
)
def test_a_name_of_an_adapter_that_is_no_folder_s_is_refused_when_it_is_given(name):
    with pytest.raises(StateError, match="adapter name") as caught:
        adapted(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("length", [240, 100_000])
def test_a_long_name_of_a_module_is_saved_and_loaded(tmp_path, length):
    def made():
        torch.manual_seed(0)
        model = nn.Module()
        model.add_module("m" * length, nn.Linear(6, 10))
        return model

    model, again = made(), made()
    inject(model, LoraConfig(r=2, lora_alpha=6, target_modules=["m" * length]))
    save_adapter(model, tmp_path / "adapter")
    load_adapter(again, tmp_path / "adapter")

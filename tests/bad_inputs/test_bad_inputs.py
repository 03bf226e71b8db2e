"""Bad input, row by row: a typed error of one line that names the thing and the way out. Never a raw error, never silence.

Each row is ``(label, call, type, what the message names, what it offers)``; the rows lie beside this file, by what they are about.
``pytest tests/bad_inputs`` counts them.
"""

import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest

from minilora import LoraConfig, inject, save_adapter
from minilora.cli import main
from minilora.errors import MiniLoraError
from tests.bad_inputs import command, files, models, values
from tests.bad_inputs.world import World

ROWS = [
    pytest.param(*row[1:], id=f"{place.__name__.rpartition('.')[2]}: {row[0]}"[:90])
    for place in (values, models, files)
    for row in place.ROWS
]


@pytest.fixture
def world(tmp_path, make_mlp, make_gpt2, make_llama):
    return World(tmp_path, make_mlp, make_gpt2, make_llama)


@pytest.mark.parametrize(("call", "kind", "thing", "way"), ROWS)
def test_it_is_refused(world, call, kind, thing, way):
    with pytest.raises(MiniLoraError) as caught:
        call(world)
    message = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in message and 20 < len(message) < 1300, message
    assert thing in message and way in message, message
    assert re.search(r"; |wanted|closest|Please |[Mm]ust |Set ", message), f"no way out: {message}"


@pytest.fixture(scope="module")
def places(tmp_path_factory, model_folder, make_mlp, make_llama):
    """What stands in braces in the words of a command."""
    base = tmp_path_factory.mktemp("places")
    for name in ("empty", "run", "kept"):
        (base / name).mkdir()
    texts = {
        "file": "no toml",
        "data": '{"prompt": "What is it?", "completion": "ab"}\n' * 4,
        "toml": "stepz = 3",
        "toml2": 'steps = "many"',
    }
    for name, text in (texts | {"run/log.jsonl": "{}", "kept/job.toml": ""}).items():
        (base / name).write_text(text)
    save_adapter(inject(make_mlp(), LoraConfig(r=2, target_modules=["first"])), base / "foreign")
    save_adapter(inject(make_llama(), LoraConfig(r=2, target_modules=["q_proj"])), base / "adapter")
    broken = {"untyped": ("config.json", "{}"), "strange": ("config.json", '{"model_type": "lamma"}')}
    broken |= {
        "cut": ("model.safetensors", "no"),
        "wordless": ("tokenizer.json", "{}"),
        "half": ("config.json", '{"model_'),
    }
    broken |= {"wide": ("config.json", _wider(model_folder)), "textual": ("config.json", _wider(model_folder, "wide"))}
    for name, (file, text) in broken.items():
        shutil.copytree(model_folder, base / name)
        (base / name / file).write_text(text)
    folders = ("empty", "run", "kept", "foreign", "adapter", *broken)
    return {name: base / name for name in (*texts, *folders)} | {"model": model_folder}


def _wider(model_folder, size=128):
    """The config of the model with another width than its weights have."""
    return json.dumps(json.loads(Path(model_folder, "config.json").read_text()) | {"hidden_size": size})


@pytest.fixture(scope="module")
def quiet():
    """The commands turn bars off by the environment, which transformers reads once, at its first import."""
    transformers = pytest.importorskip("transformers")
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    with mock.patch.dict(os.environ):
        yield
    if shown:
        transformers.utils.logging.enable_progress_bar()


@pytest.mark.parametrize(("words", "thing", "way"), command.LINES, ids=[" ".join(row[0]) for row in command.LINES])
def test_a_command_is_refused(capsys, tmp_path, places, quiet, words, thing, way):
    known = {name: str(place) for name, place in places.items()} | {"out": str(tmp_path / "out")}
    code = main([word.format(**known) for word in words])
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.err.count("\n") == 1 and "Traceback" not in captured.err + captured.out, captured.err
    line = captured.err.removeprefix("minilora: ")
    assert line != captured.err and thing.format(**known) in line and way in line, line
    assert re.search(r"; |wanted|closest", line), f"no way out: {line}"
    assert not (tmp_path / "out").exists()


def test_there_are_300_of_them():
    assert len(ROWS) + len(command.LINES) >= 300
    names = [row.id for row in ROWS] + [" ".join(row[0]) for row in command.LINES]
    assert len(set(names)) == len(names), "two rows of one name"

"""An adapter of somebody who seals it anew after every change: it is refused in one line, or it is loaded to the file's numbers."""

import hashlib
import json
import random
import time

import pytest
import torch
from torch import nn

from minilora import LoraConfig, inject, load_adapter, save_adapter
from minilora.errors import MiniLoraError
from minilora.store import adapter_files
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from tests.hostile import nested


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3))


HOSTILE = [
    10**400, 2**63, -1, 0, True, None, 0.5, 1e300, float("nan"), float("inf"), "", "x" * 5_000, "9" * 4_000, "\ud800", "../../x",
    "a\nb\x1b[2J\x07\u202e\u2028", [], {}, [[]], nested(15), nested(400), ["0"] * 50_000, {f"k{at}": at for at in range(70_000)},
    {"a\x1b]0;x\x07\n": 1}, "(a+)+$", "pissa_niter_" + "9" * 4_000, {"loftq_iter": 10**6}, {"loftq_bits": 10**300},
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    model = inject(plain(), LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape))
    save_adapter(model, tmp_path)
    return tmp_path, model(torch.ones(6))


def seal(place, base=None):
    files = {name: (place / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    found = json.loads((place / SEAL_FILE).read_text())["base"] if base is None else base
    (place / SEAL_FILE).write_bytes(adapter_files.seal(files, found)[SEAL_FILE])


def outcome(place, snapshot):
    model = plain()
    before = snapshot(model)
    began, said = time.process_time(), None
    try:
        load_adapter(model, place)
    except MiniLoraError as error:
        said = str(error)
    assert time.process_time() - began < 4, said  # 2 s where nothing else runs
    if said is None:
        return "loaded", model(torch.ones(6))
    assert said.isprintable() and len(said) < 1_300
    assert snapshot(model) == before
    return "refused", None


def test_every_field_of_a_config_with_every_hostile_value(folder, snapshot):
    """What does not change the adapter's numbers may have any value that it may have; all else is refused, or does what it says."""
    place, wanted = folder
    config = json.loads((place / CONFIG_FILE).read_text())
    draw, loaded = random.Random(5), []
    for key in config:
        for value in draw.sample(HOSTILE, 5):
            (place / CONFIG_FILE).write_text(json.dumps(config | {key: value}))
            seal(place)
            result, found = outcome(place, snapshot)
            if result == "loaded":
                loaded.append(key)
                same = torch.equal(found, wanted)
                assert same or key in ("lora_alpha", "r", "use_rslora", "alpha_pattern", "lora_dropout", "use_dora"), (
                    key,
                    value,
                )
    assert 0 < len(loaded) < 4 * len(config)


@pytest.mark.parametrize("part", ["parameters", "samples", "tensors", "0", "more"])
def test_every_part_of_a_seal_with_every_hostile_value(folder, snapshot, part):
    """A seal that remembers another base is refused, and one that remembers less is one of an older minilora."""
    place, wanted = folder
    base = json.loads((place / SEAL_FILE).read_text())["base"]
    for value in random.Random(7).sample(HOSTILE, 14):
        changed = json.loads(json.dumps(base))
        (changed["samples"] if part == "0" else changed)[part] = value
        seal(place, changed)
        result, found = outcome(place, snapshot)
        assert result == "refused" or (part in ("samples", "tensors") and value == {} and torch.equal(found, wanted)), (
            value
        )


@pytest.mark.parametrize(
    "many",
    [
        {"samples": {f"m{at}": ["float32", "0" * 8 * 16] for at in range(30_000)}},
        {"tensors": {f"m{at}": ["float32 0 ", []] for at in range(100_000)}},
        {"tensors": {"0.bias": ["float32 0123456789abcdef ", list(range(500_000))]}},
    ],
    ids=["samples", "tensors", "rows"],
)
def test_a_seal_of_many_entries_is_read_soon(folder, snapshot, many):
    place, _ = folder
    base = json.loads((place / SEAL_FILE).read_text())["base"]
    seal(place, base | {key: base.get(key, {}) | value for key, value in many.items()})
    outcome(place, snapshot)


def test_500_000_unknown_keys_are_refused_soon(folder, snapshot):
    place, _ = folder
    (place / SEAL_FILE).unlink()
    config = json.loads((place / CONFIG_FILE).read_text())
    text = json.dumps(config | dict.fromkeys(range(500_000), 1))
    for more in ("", " " * 10_000_000):  # what is read as JSON, and what is too long for it
        (place / CONFIG_FILE).write_text(text + more)
        assert outcome(place, snapshot)[0] == "refused"


def test_the_seal_of_a_stranger_proves_nothing_and_its_digest_does(folder):
    """Whoever changes the weights can seal them anew; ``expect_sha256``, kept elsewhere, is what finds it."""
    place, _ = folder
    digest = adapter_files.adapter_sha256({name: (place / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)})
    raw = bytearray((place / WEIGHTS_FILE).read_bytes())
    raw[-1] ^= 1
    (place / WEIGHTS_FILE).write_bytes(raw)
    seal(place)
    load_adapter(plain(), place)
    with pytest.raises(MiniLoraError, match="this is another adapter"):
        load_adapter(plain(), place, expect_sha256=digest)
    assert hashlib.sha256(raw).hexdigest() in (place / SEAL_FILE).read_text()

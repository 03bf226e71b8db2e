"""Every field of every config, with values of every kind and size: taken if it can be meant, or refused in one line."""

import dataclasses
import time

import pytest

from minilora import LoraConfig, QuantConfig
from minilora.cli import main
from minilora.errors import ConfigError, MiniLoraError
from minilora.files.validate import shown
from minilora.hf.trials import BenchJob, PlanJob
from minilora.job.settings import Job
from minilora.lora.starts import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from minilora.training.settings import TrainConfig
from tests.hostile import nested

HOSTILE = [
    10**400, 10**5_000, -(10**5_000), -1, 2**63, True, None, 0.5, 1e300, float("nan"), float("inf"), "", "x" * 5_000, "a\n\x1b[2J\u202e",
    "\ud800", [], {}, [[]], nested(400), nested(100_000), [10**5_000], {"a": 10**5_000}, b"x", object(), ("\x1b",),
]  # fmt: skip
CONFIGS = {
    Job: {"model": "m", "data": "d", "out": "o"},
    PlanJob: {"model": "m"},
    BenchJob: {"model": "m"},
    TrainConfig: {},
    LoraConfig: {"target_modules": ["a"]},
    EvaConfig: {},
    CordaConfig: {},
    LoraGAConfig: {},
    LoftQConfig: {},
    QuantConfig: {},
}
FIELDS = [(config, field.name) for config in CONFIGS for field in dataclasses.fields(config)]


@pytest.mark.filterwarnings(
    "ignore:.* specified but will be ignored:UserWarning"
)  # settings of a start that is not asked for
@pytest.mark.parametrize(("config", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_a_value_of_any_kind_is_taken_or_refused(config, name):
    refused = 0
    for value in HOSTILE:
        said, began = "", time.process_time()
        try:
            made = config(**(CONFIGS[config] | {name: value}))
        except MiniLoraError as error:
            said, refused = str(error), refused + 1
        else:
            held = getattr(made, name)
            assert not isinstance(held, (int, float)) or -1e300 < held < 1e300, held
        assert said == "" or (said.isprintable() and len(said) < 1_300)
        assert time.process_time() - began < 2
    assert refused > len(HOSTILE) // 2


def test_what_is_too_large_to_be_written_is_said_to_be():
    for value in (10**5_000, -(10**5_000), [10**5_000], nested(100_000)):
        assert shown(value) == f"a {type(value).__name__} that is too large to be written out"


@pytest.mark.parametrize(
    "number", ["0x" + "f" * 5_000, "[0x" + "f" * 5_000 + "]", "0b" + "1" * 20_000, "9" * 5_000, "1e999999", "nan"]
)
@pytest.mark.parametrize("name", ["steps", "lr", "target_modules", "quant", "seed", "clip"])
def test_a_number_of_any_length_in_a_settings_file_is_refused_in_one_line(tmp_path, capsys, name, number):
    """Python writes no number of more than 4,300 digits, and reads one of them all the same where it is in hexadecimal."""
    file = tmp_path / "job.toml"
    file.write_text(f'model = "m"\ndata = "d"\nout = "{tmp_path}/o"\n{name} = {number}\n')
    assert main(["train", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and len(said) < 1_500 and "Exceeds" not in said.split("job.toml")[0]


def test_a_key_of_a_megabyte_is_refused_soon(tmp_path, capsys):
    (tmp_path / "job.toml").write_text(f"{'k' * 990_000} = 1\n")
    began = time.process_time()
    assert main(["train", "--config", str(tmp_path / "job.toml")]) == 2
    assert time.process_time() - began < 2 and len(capsys.readouterr().err) < 1_500


def test_a_number_that_no_float_holds_is_no_number():
    with pytest.raises(ConfigError, match="clip="):
        TrainConfig(clip=10**400)

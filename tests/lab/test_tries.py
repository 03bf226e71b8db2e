"""Claims tried into a folder: shared out among processes, kept, gone on with; one that fails costs the others nothing."""

import json
import math
import os
import signal
import time

import pytest
import torch

from minilora.errors import CheckpointError, ConfigError, Interrupted
from minilora.lab.ground.claim import HOLDS
from minilora.lab.ground.ground import Ground
from minilora.lab.trying import tries
from minilora.lab.trying.cells import as_lines, pack, shown, unpack
from minilora.lab.trying.tried import JSON_FILE, read
from minilora.lab.verdicts.interval import Interval, interval
from tests.lab.planted import FINDS, plant


@pytest.fixture
def here(monkeypatch):
    """Claims are tried in this process, one after the other; the list has the names of those that were."""
    tried = []

    def in_turn(names, steps, workers, wish):
        for name in names:
            tried.append(name)
            yield tries.try_claim(name, Ground(steps))

    monkeypatch.setattr(tries, "_tries", in_turn)
    return tried


def quiet(line):
    pass


# ---- values


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (Interval(1.21, 1.16, 1.26), "1.21 (1.16 to 1.26)"),
        (interval([0.5]), "0.5 (one seed)"),
        ({0: 1.0, 1: 1.0}, "1 (1 to 1)"),
        ({0: 1.0, 1: math.inf}, "0: 1, 1: inf"),
        ({"q": "yes"}, "q: yes"),
        (2e-5, "2e-5"),
        (21504, "21,504"),
        (True, "yes"),
        (None, ""),
        ([1, 2.5], "1, 2.5"),
        ("r=4", "r=4"),
    ],
)
def test_a_value_is_shown(value, words):
    assert shown(value) == words


@pytest.mark.parametrize(
    "value", [interval([0.5]), interval([1.0, 1.5]), {0: 1.0, 1: math.inf}, [1, "a", None, {"b": -math.inf}], True, "x"]
)
def test_a_value_comes_back_from_json(value):
    again = unpack(json.loads(json.dumps(pack(value), allow_nan=False)))
    assert repr(again) == repr(value)  # NaN is not equal to itself


def test_what_json_cannot_hold_is_refused_by_its_type():
    assert pack(torch.tensor(2.5)) == 2.5
    with pytest.raises(ConfigError, match="holds a object; wanted numbers"):
        pack({"a": [object()]})


def test_rows_are_a_table_of_a_terminal():
    rows = [{"variant": "a", "loss": 1.5}, {"variant": "bb", "more": 2}]
    assert as_lines(rows).splitlines() == ["variant  loss  more", "a         1.5", "bb                2"]
    assert as_lines([]) == ""


# ---- a folder


def test_a_folder_goes_on_with_what_is_missing(monkeypatch, tmp_path, here):
    plant(monkeypatch, tmp_path, one=FINDS, two=FINDS)
    out = tmp_path / "out"
    tries.try_into(out, ["two"], steps=3, say=quiet)
    first = (out / JSON_FILE).read_bytes()
    found = tries.try_into(out, ["one", "two", "one"], steps=3, say=quiet)
    assert here == ["two", "one"] and set(found) == {"one", "two"}
    assert repr(read(out)["two"].finding.rows) == repr(found["two"].finding.rows)
    assert json.loads(first)["claims"]["two"]["finding"]["verdict"] == HOLDS
    tries.try_into(out, ["two"], steps=3, overwrite=True, say=quiet)
    assert here == ["two", "one", "two"] and set(read(out)) == {"one", "two"}
    assert "run.lock" not in os.listdir(out)


def test_findings_of_other_steps_are_not_mixed_in(monkeypatch, tmp_path, here):
    plant(monkeypatch, tmp_path, one=FINDS)
    tries.try_into(tmp_path / "out", ["one"], steps=3, say=quiet)
    before = (tmp_path / "out" / JSON_FILE).read_bytes()
    with pytest.raises(ConfigError, match=r"one is of 3 steps, not 4; .*--overwrite"):
        tries.try_into(tmp_path / "out", ["one"], steps=4, say=quiet)
    assert (tmp_path / "out" / JSON_FILE).read_bytes() == before and here == ["one"]
    assert tries.try_into(tmp_path / "out", ["one"], steps=4, overwrite=True, say=quiet)["one"].steps == 4


def test_a_claim_whose_file_has_changed_is_tried_anew(monkeypatch, tmp_path, here):
    plant(monkeypatch, tmp_path, one=FINDS)
    tries.try_into(tmp_path / "out", ["one"], say=quiet)
    plant(monkeypatch, tmp_path, one=FINDS.replace("HOLDS", "FAILS"))
    said = []
    found = tries.try_into(tmp_path / "out", ["one"], say=said.append)
    assert here == ["one", "one"] and found["one"].finding.verdict == "fails here"
    assert said[0].startswith("one: its file is another one")


def test_a_damaged_file_is_refused_and_stays(monkeypatch, tmp_path, here):
    plant(monkeypatch, tmp_path, one=FINDS)
    for text in ('{"claims": {"one": {}}}', "{", '{"claims": 3}'):
        (tmp_path / JSON_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=r"lab\.json: holds no findings"):
            tries.try_into(tmp_path, ["one"], say=quiet)
        assert (tmp_path / JSON_FILE).read_text() == text
    assert here == []


def test_what_is_no_finding_is_refused(monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, none="return None", odd='return Finding("perhaps", "x")')
    for name in ("none", "odd"):
        with pytest.raises(ConfigError, match="wanted a Finding with one of the three verdicts"):
            tries.try_claim(name, Ground(1))


# ---- processes


def test_one_that_fails_or_dies_costs_the_others_nothing(monkeypatch, tmp_path):
    bodies = {
        "dies": "import os; os._exit(3)",
        "fails": "return 1 / 0",
        "odd": 'return Finding(HOLDS, "", [{"a": object()}])',
    }
    plant(monkeypatch, tmp_path, **bodies, one=FINDS, two=FINDS)
    said, out = [], tmp_path / "out"
    found = tries.try_into(out, ["dies", "fails", "odd", "one", "two"], steps=2, workers=2, say=said.append)
    assert len(said) == 5 and said[-1].endswith("(5 of 5)")
    failed = {name: tried.failed for name, tried in found.items() if tried.finding is None}
    assert failed["fails"] == "ZeroDivisionError: division by zero" and "exit code 3" in failed["dies"]
    assert "holds a object" in failed["odd"] and set(failed) == {"dies", "fails", "odd"}
    assert found["one"].finding.said == "It took 2 steps." and torch.__version__ in found["one"].place
    assert found["one"].finding.rows[0]["loss"] == interval([1.0, 1.2, 1.1])
    plant(monkeypatch, tmp_path, fails=FINDS)
    again = tries.try_into(out, ["fails", "one"], steps=2, say=said.append)
    assert len(said) == 6 and again["fails"].finding.verdict == HOLDS  # one that failed is tried again, and no other


def test_ctrl_c_keeps_what_is_done(monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, one=FINDS, waits="import time; time.sleep(300)")
    began = time.monotonic()

    def interrupt(line):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="goes on with waits") as caught:
        tries.try_into(tmp_path / "out", ["one", "waits"], workers=2, say=interrupt)
    assert caught.value.exit_code == 130 and time.monotonic() - began < 200
    assert set(read(tmp_path / "out")) == {"one"} and "## one" in (tmp_path / "out" / "lab.md").read_text()

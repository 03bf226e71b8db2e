"""``minilora lab``: the list of claims, one claim, a folder of all, and the table of variants."""

import inspect
import re
import sys
import types

import pytest

from minilora.cli import lab, main, make_parser
from minilora.lab.ground.ground import Ground
from minilora.lab.trying import tries
from minilora.lora import adapter
from tests.lab.planted import FINDS, plant

pytest.importorskip("transformers")
TRAINS = """
    tuned = ground.tune({"r=3": {"r": 3}}, (1e-3,), (0, 1))["r=3"]
    return Finding(FAILS, "Trained.", [{"rank": "r=3", "loss": tuned.losses}])
"""


def run(capsys, *words):
    code = main(["lab", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture
def in_turn(monkeypatch):
    """Claims are tried in this process; what happens among several is in tests/lab/test_tries.py."""

    def tried(names, steps, workers, wish):
        for name in names:
            try:
                yield tries.try_claim(name, Ground(steps))
            except ZeroDivisionError as error:
                yield tries._untried(name, steps, failed=str(error))

    monkeypatch.setattr(tries, "_tries", tried)


def test_the_steps_are_those_of_the_ground():
    assert inspect.signature(Ground).parameters["steps"].default == lab.STEPS


def test_the_claims_are_listed(capsys, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, one=FINDS, two=FINDS)
    code, out, err = run(capsys)
    assert (code, err) == (0, "") and out.startswith(
        "one\n  It *is* so | or not.\n  Somebody 2025, section 3: 4 of 5\ntwo\n"
    )
    assert re.search(r"\nnext: .*lab one\n$", out)


def test_what_is_listed_can_be_asked_for(capsys):
    code, out, _ = run(capsys)
    names = re.findall(r"^([\w-]+)$", out, re.M)
    assert code == 0 and "rank-lr" in names and lab.VARIANTS not in names


def test_one_claim_says_what_is_claimed_and_found(capsys, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, one=FINDS)
    code, out, _ = run(capsys, "one", "--steps", "7")
    assert code == 0 and out.startswith(
        "one: It *is* so | or not.\nSomebody 2025, section 3: 4 of 5\n\nIt took 7 steps.\n"
    )
    assert re.search(r"^what +loss +by seed +more$", out, re.M) and re.search(
        r"^a +1\.1 \(0\.\d+ to 1\.\d+\)", out, re.M
    )
    assert re.search(r"^holds here \(\d+\.\d s\)$", out, re.M)


def test_a_claim_that_trains_shows_how_far_it_is(capsys, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, trains=TRAINS)
    code, out, err = run(capsys, "trains", "--steps", "2")
    assert code == 0 and "2 fine-tunings" in err and "4 of 4 steps" in err
    assert re.search(r"^r=3 +\d\.\d+ \(\d\.\d+ to \d\.\d+\)$", out, re.M) and "fails here" in out


def test_all_go_into_a_folder_and_are_not_tried_twice(capsys, monkeypatch, tmp_path, in_turn):
    plant(monkeypatch, tmp_path, one=FINDS, bad="return 1 / 0", two=FINDS)
    words = ("--all", "--out", tmp_path / "out", "--steps", "2")
    code, out, err = run(capsys, *words)
    assert code == 1 and "1 of 3 claims could not be tried: bad; the same command tries them again" in err
    assert "bad: could not be tried: division by zero" in out and "two: holds here; 0 s (3 of 3)" in out
    plant(monkeypatch, tmp_path, bad=FINDS)
    code, out, err = run(capsys, *words)
    assert (code, err) == (0, "") and out.splitlines() == [
        "bad: holds here; 0 s (1 of 1)",
        f"{tmp_path}/out/lab.md: 3 claims",
    ]
    code, out, _ = run(capsys, *words, "--overwrite")
    assert code == 0 and "(3 of 3)" in out


def test_the_table_of_variants_has_a_row_for_ones_own(capsys, monkeypatch, tmp_path):
    """The table is of ``lab/variants.py``; here one stands in for it that says what it was given."""
    monkeypatch.setattr(adapter, "VARIANTS", dict(adapter.VARIANTS))
    monkeypatch.setitem(adapter._ON, "linear", adapter.VARIANTS)

    def fair_table(ground, variants=None):
        return [{"variant": name, "steps": ground.steps} for name in variants]

    table = types.SimpleNamespace(fair_table=fair_table, KNOWN={"lora": {}, "rslora": {}})
    monkeypatch.setitem(sys.modules, "minilora.lab.variants", table)
    file = tmp_path / "mine.py"
    file.write_text("from minilora import LoRALinear, register\n@register('mine')\nclass Mine(LoRALinear): ...\n")
    code, out, err = run(capsys, "variants", "--plugin", file, "--steps", "9")
    assert code == 0 and err == f"{file}: variant 'mine'\n"
    assert re.match(r"variant +steps\nlora +9\nrslora +9\nmine +9\n\n", out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing-of-it"], "claim 'nothing-of-it' is not known"),
        (["rank-lr", "nothing-of-it"], "claim 'nothing-of-it' is not known"),
        (["--all"], "--all: .*add --out FOLDER"),
        (["--all", "rank-lr", "--out", "o"], "--all: means every claim"),
        (["--out", "o"], "--out: no claim is named"),
        (["rank-lr", "--workers", "2"], "--workers: .*add --out FOLDER"),
        (["rank-lr", "--overwrite"], "--overwrite: .*add --out FOLDER"),
        (["rank-lr", "--steps", "0"], "steps=0: wanted a whole number >= 1"),
        (["rank-lr", "--workers", "0"], "workers=0: wanted a whole number >= 1"),
        (["variants", "rank-lr"], "variants: its table is printed by itself"),
        (["variants", "--out", "o"], "variants: its table is printed by itself"),
    ],
)
def test_what_would_do_nothing_is_refused(capsys, monkeypatch, tmp_path, words, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and re.match(f"minilora: {said}", err), err
    assert not list(tmp_path.iterdir())


def test_a_plugin_is_for_the_table_alone(capsys, tmp_path):
    (tmp_path / "empty.py").write_text("")
    code, _, err = run(capsys, "rank-lr", "--plugin", tmp_path / "empty.py")
    assert code == 2 and "minilora lab variants does" in err


def test_a_finding_of_other_steps_is_refused(capsys, monkeypatch, tmp_path, in_turn):
    plant(monkeypatch, tmp_path, one=FINDS)
    assert run(capsys, "one", "--out", tmp_path / "out", "--steps", "2")[0] == 0
    code, _, err = run(capsys, "one", "--out", tmp_path / "out")
    assert code == 2 and "is of 2 steps, not 60" in err
    assert make_parser().parse_args(["lab"]).steps == 60

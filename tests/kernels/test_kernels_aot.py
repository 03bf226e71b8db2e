"""The gates of ``kernels/aot.py`` on real machine code: shipped kernels pass, and one with a known fault is caught.

Compiles for cards that are not here, in a process of its own, because this one interprets. The whole matrix is ``make kernels``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton, which is there for Linux only: pip install triton")

ROOT = Path(__file__).resolve().parents[2]
BEGIN = """
import importlib.util, pathlib, sys, tempfile
sys.path.insert(0, "kernels")
import torch
from aot_gates import against, checked
from aot_launches import calls, launch, record, weight
import minilora_kernels.linear as linear

def faults(change):
    '''What the gates say of the forward kernel on Hopper after a change to its source.'''
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "changed.py")
        path.write_text(change(pathlib.Path(linear.__file__).read_text()))
        spec = importlib.util.spec_from_file_location("changed", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
        return checked(record("sm_90", "changed", lambda: module.nf4_linear(x, weight(), path="fused"))[0])["faults"]
"""


def run(code):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_the_shipped_kernel_passes():
    assert run("print(faults(lambda source: source))") == "[]"


def test_a_loop_that_may_be_empty_is_caught():
    found = run("print(faults(lambda source: source.replace('tl.assume(K >= BK)', 'pass')))")
    assert "ptxas C7515" in found and "waits for every product" in found


def test_a_tile_too_large_is_caught():
    code = "linear.launch.LINEAR['sm_90'] = [linear.Tile(256, 256, 64, 8, 4)]\nprint(faults(lambda source: source))"
    found = run(code)
    assert "spills" in found or "registers" in found


def test_lengths_are_held_against_the_baseline():
    code = """
rows = [{"arch": "sm_90", "launch": "a", "length": 106, "faults": []}, {"arch": "sm_90", "launch": "b", "length": 105, "faults": []},
        {"arch": "sm_90", "launch": "c", "length": 1, "faults": []}]
against(rows, {"sm_90 a": 100, "sm_90 b": 100})
print([row["faults"] for row in rows])
"""
    assert run(code) == "[['length 106 > 100 + 5 %'], [], ['no committed length; look at it, then --accept']]"


def test_every_architecture_has_all_kernels():
    names = run("print(sorted({(arch, one.fn.__name__) for arch in launch.ARCHS for label, call in calls(arch).items() "
                "for one in record(arch, label, call)}))")  # fmt: skip
    kernels = [
        "bwd_a",
        "bwd_b",
        "dequant",
        "dgrad",
        "down",
        "gemv",
        "grouped_dgrad",
        "grouped_linear",
        "linear",
        "quantize",
        "total",
    ]
    assert all(
        f"('{arch}', '{name}_kernel')" in names
        for arch in ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
        for name in kernels
    )


def test_what_is_accepted_takes_the_place_of_that_version_only():
    code = """
import csv, json
import aot_gates
place = pathlib.Path(tempfile.mkdtemp())
aot_gates.BASELINE, aot_gates.RESULTS = place / "lengths.json", place / "kernels.csv"
aot_gates.RESULTS.write_text("triton,launch,arch,registers,shared_kb,length\\n3.7,old,sm_90,1,2,3\\n3.10,kept,sm_90,4,5,6\\n")
aot_gates.accept([{"launch": "new", "arch": "sm_80", "registers": 96, "shared": 49200, "length": 137}], "3.7")
print(json.loads(aot_gates.BASELINE.read_text()), [list(line.values()) for line in csv.DictReader(aot_gates.RESULTS.open())])
"""
    assert run(code) == (
        "{'3.7': {'sm_80 new': 137}} [['3.7', 'new', 'sm_80', '96', '48', '137'], ['3.10', 'kept', 'sm_90', '4', '5', '6']]"
    )

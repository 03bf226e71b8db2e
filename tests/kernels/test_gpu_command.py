"""``make gpu`` as far as a computer without a GPU can try it: the whole command, tiny, in Triton's interpreter."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton, which is there for Linux only: pip install triton")

COMMAND = [sys.executable, str(Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py")]


def run(*arguments, cwd):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300)


def test_checks_and_timings_run_and_are_written(tmp_path):
    done = run("--interpret", "--out", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("PASS") > 40 and "FAIL" not in done.stdout and "SKIP" not in done.stdout
    (path,) = tmp_path.glob("gpu_*.csv")
    first, *rows = path.read_text().splitlines()
    assert first.startswith("# interpreter; copy ") and "triton" in first
    rows = list(csv.DictReader(rows))
    assert {row["pass"] for row in rows} == {"dequant", "forward", "dgrad", "grouped forward", "grouped dgrad"}
    assert len({(row["pass"], row["M"], row["method"]) for row in rows}) == len(rows) == 1 + 2 * 2 * 6 + 2 * 4
    assert all(float(row["us"]) > 0 for row in rows)


BROKEN = """
import runpy, sys
sys.argv = ["gpu.py", "--interpret", "--only", "linear,dgrad"]
sys.path.insert(0, "{folder}")
import minilora_kernels.linear as linear
real = linear.nf4_linear
import minilora_kernels
minilora_kernels.nf4_linear = lambda *a, **k: real(*a, **k) * 1.01
runpy.run_path("{command}", run_name="__main__")
"""


def test_a_wrong_kernel_fails_the_command_and_names_it(tmp_path):
    folder = Path(COMMAND[1]).parents[1] / "kernels"
    code = BROKEN.format(folder=folder, command=COMMAND[1])
    environment = {"TRITON_INTERPRET": "1", "PATH": "", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300, env=environment
    )
    assert done.returncode == 1, done.stderr[-1000:]
    assert (
        "FAIL  linear M33" in done.stdout
        and "FAILED: linear" in done.stdout
        and "dgrad" not in done.stdout.split("FAILED")[1]
    )


def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run(cwd=tmp_path)
    assert done.returncode == 1 and "no CUDA device found; --interpret" in done.stderr


def test_an_unknown_stage_is_refused(tmp_path):
    done = run("--interpret", "--only", "gem", cwd=tmp_path)
    assert done.returncode == 1 and "--only: unknown gem" in done.stderr

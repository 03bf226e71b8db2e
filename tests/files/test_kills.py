"""SIGKILL at every call of a save (``kills.py``): the folder loads, old or new, and the next save leaves nothing behind."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts the calls of Linux")


def points(*arguments):
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return [
        int(number) for number in re.findall(r": (\d+) kill points, \1 left the old or the new, 0 lost", done.stdout)
    ]


def test_an_adapter_survives_a_kill_at_every_call():
    assert points("adapter")[0] >= 25


@pytest.mark.slow
def test_a_training_run_survives_a_kill_at_every_call():
    found = points("adapter beside a folder", "training")
    assert found[0] >= 30 and found[1] >= 100


def can_trace():
    """Whether strace is there and may attach to a process."""
    if shutil.which("strace") is None:
        return False
    sleeper = subprocess.Popen(["sleep", "5"])
    done = subprocess.run(["timeout", "0.5", "strace", "-qq", "-p", str(sleeper.pid)], capture_output=True, text=True)
    sleeper.kill()
    sleeper.wait()
    return "Operation not permitted" not in done.stderr


@pytest.mark.slow
def test_the_kernel_kills_at_every_call():
    if not can_trace():
        pytest.skip("strace is not installed, or ptrace is not permitted")
    assert all(number >= 40 for number in points("--strace"))

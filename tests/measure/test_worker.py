"""Workers: answers come whole whatever else is printed, errors keep their kind, and a dead process is said to be dead."""

import importlib.util
import sys
import textwrap
from pathlib import Path

import pytest

from minilora.errors import ConfigError, StateError
from minilora.measure import worker
from minilora.measure.worker import Worker, anonymous_bytes, can_measure, peak_anonymous_bytes, reset_peak

LINUX = pytest.mark.skipif(not can_measure(), reason="peak memory is read from Linux")
TASKS = """
    import os
    import sys

    from minilora.errors import ConfigError


    def make(settings):
        def answer(request):
            if request == "typo":
                raise ConfigError("r=0: wanted a whole number >= 1")
            if request == "bug":
                return {"x": [][0]}
            if request == "die":
                print("last words", file=sys.stderr)
                sys.stderr.flush()
                os.kill(os.getpid(), 9)
            print("noise of a library")
            os.system("echo noise of a program")
            if request == "memory":
                return {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
            return {"said": request, "threads": os.environ.get("OMP_NUM_THREADS"), **settings}

        return answer
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    (tmp_path / "tasks_of_the_test.py").write_text(textwrap.dedent(TASKS))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "tasks_of_the_test:make"


def test_freed_memory_goes_back_where_it_is_measured_alone(target):
    """The two settings are of glibc; a worker that measures nothing keeps what it has freed, and is faster."""
    for measured, trims in ((True, False), (False, True)):
        with Worker(target, {}, measured=measured) as running:
            found = running.ask("memory")
        assert (int(found["MALLOC_MMAP_THRESHOLD_"]) < 2**20) is measured
        assert ("MALLOC_TRIM_THRESHOLD_" in found) is trims


def test_a_worker_answers_fails_and_dies(target):
    with Worker(target, {"r": 3}, threads=1) as running:
        assert running.ask("hé\n") == {"said": "hé\n", "threads": "1", "r": 3}
        with pytest.raises(ConfigError, match=r"^r=0: wanted a whole number >= 1$"):
            running.ask("typo")
        with pytest.raises(StateError, match=r"^tasks_of_the_test: IndexError: list index out of range$"):
            running.ask("bug")
        assert running.ask("again")["said"] == "again"  # an error is not the end
        with pytest.raises(StateError, match=r"killed, most likely for want of memory.*last words") as caught:
            running.ask("die")
        assert "\n" not in str(caught.value)
        with pytest.raises(StateError, match="its process ended"):
            running.ask("anything")


def test_a_target_that_is_not_there_is_an_error(target):
    with Worker("tasks_of_the_test:other", {}) as running, pytest.raises(StateError, match="AttributeError"):
        running.ask("x")


def test_leaving_ends_the_process(target):
    with Worker(target, {}) as running:
        process = running._process
        running.ask("x")
        assert process.poll() is None
    assert process.poll() is not None


@LINUX
def test_the_peak_is_seen_after_it_has_gone():
    import mmap

    before = anonymous_bytes()
    reset_peak()
    block = mmap.mmap(-1, 40_000_000, flags=mmap.MAP_PRIVATE)  # from the system, whatever an allocator has kept
    for start in range(0, len(block), mmap.PAGESIZE):
        block[start] = 1
    held = anonymous_bytes()
    block.close()
    assert held - before == pytest.approx(40e6, rel=0.05)
    assert peak_anonymous_bytes() - before == pytest.approx(40e6, rel=0.1)
    reset_peak()
    assert peak_anonymous_bytes() - before < 20e6


@pytest.mark.parametrize("text", ["", "VmHWM:\t 12 kB\nRssAnon:\t 3 kB\nName:\tpython\n"])
def test_sizes_are_read_in_bytes(tmp_path, monkeypatch, text):
    monkeypatch.setattr(worker.Path, "read_text", lambda *_, **__: text)
    assert worker._status() == ({"VmHWM": 12 * 1024, "RssAnon": 3 * 1024} if text else {})
    assert sys.platform != "linux" or worker.can_measure() is bool(text)


def test_a_worker_finds_the_package_and_no_folder_of_it_as_one(tmp_path, monkeypatch):
    """With ``minilora/`` itself on the path, ``import peft`` would be minilora's own."""
    places = "def make(settings):\n    import importlib.util\n    return lambda name: {'at': importlib.util.find_spec(name).origin}\n"
    (tmp_path / "places_of_the_test.py").write_text(places)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    package = Path(worker.__file__).parents[1]
    with Worker("places_of_the_test:make", {}) as running:
        assert Path(running.ask("minilora")["at"]) == package / "__init__.py"
        if importlib.util.find_spec("peft"):
            assert not Path(running.ask("peft")["at"]).is_relative_to(package)


def test_one_that_is_ended_from_outside_says_what_to_try(target):
    with Worker(target, {}, smaller="try fewer --workers") as running:
        running.ask("hi")
        running.kill()
        with pytest.raises(StateError, match=r"its process ended \(killed, .*; try fewer --workers\)"):
            running.ask("hi")

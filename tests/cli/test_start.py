"""How the command line starts: in milliseconds, without torch, and on systems that lack what Linux has."""

import os
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import minilora
from minilora.cli import COMMANDS

ROOT = Path(minilora.__file__).parents[1]
MOST = 0.3  # seconds of processor time, user and system
QUICK = [["--help"], ["train", "--help"], ["train", "--lerning-rate", "1"]]
TRAIN = ["train", "--model", "m", "--data", "d", "--out", "o"]


def child(*words, **environment):
    """A fresh interpreter, its compiled modules where ``environment`` says."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")
    }
    more = {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *words], env=kept | more, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A folder of compiled modules, as an installation by pip leaves them."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    for words in QUICK:
        child("-m", "minilora", *words, PYTHONPYCACHEPREFIX=folder)
    return folder


@pytest.mark.slow
def test_torchrun_starts_it():
    done = child("-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "minilora", "--version")
    assert (done.returncode, done.stdout) == (0, f"minilora {minilora.__version__}\n"), done.stderr


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_an_answer_takes_little_processor_time(compiled, words):
    resource = pytest.importorskip("resource")
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = child("-m", "minilora", *words, PYTHONPYCACHEPREFIX=compiled)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == (0 if "--help" in words else 2), done.stderr
    assert statistics.median(spent) <= MOST


LOADED = """
    import sys
    from minilora.cli import main

    heavy = ("torch", "numpy", "safetensors", "transformers", "rich")
    for words in {calls!r}:
        try:
            main(words)
        except SystemExit:
            pass
        found = [name for name in heavy if name in sys.modules]
        if found:
            sys.exit(f"{{words}} imports {{found}}")
"""


def test_help_and_refusals_need_no_torch(tmp_path):
    """The stable form of the claim above; values in TOML and names in configs are checked without it too."""
    (tmp_path / "job.toml").write_text('quant = "nf5"\n')
    calls = [[], ["--help"], ["--version"], ["tarin"], ["train", "--lerning-rate", "1"], ["train", "--steps", "x"]]
    calls += [[name, "--help"] for name in COMMANDS]
    calls += [
        [*TRAIN, *more]
        for more in (["--r", "0"], ["--lr", "2"], ["--dtype", "f8"], ["--config", str(tmp_path / "job.toml")])
    ]
    calls += [
        ["train"],
        ["demo", "--steps", "0"],
        ["generate", "hi"],
        ["generate", "--model", "m", "--quant", "x", "hi"],
    ]
    calls += [["quantize", "--model", "m", "--out", "o", "--blocksize", "48"], ["export", "--for", "ollama"]]
    calls += [
        ["plan", "--batch", "0"],
        ["bench", "--lr", "0"],
        ["merge", "--model", "m", "--adapter", "a", "--out", "o", "--dtype", "x"],
    ]
    calls += [["info"], ["compare"], ["push", "r"], ["init", str(tmp_path)], ["chat", "--model", "m", "--quant", "x"]]
    done = child("-c", textwrap.dedent(LOADED).format(calls=calls))
    assert (done.returncode, done.stderr.count("minilora: ")) == (0, len(calls) - 3 - len(COMMANDS)), done.stderr


def test_a_torch_that_is_imported_would_be_seen():
    done = child("-c", textwrap.dedent(LOADED).format(calls=[["generate", "--model", "/nowhere", "hi"]]))
    assert done.returncode == 1 and "imports ['torch'" in done.stderr


WINDOWS = """
    import os, select, signal, sys

    for name in ("resource", "fcntl", "termios", "pwd", "grp"):
        sys.modules[name] = None  # importing it raises ImportError
    del select.poll
    from minilora.cli import _nobody_reads, main

    assert not _nobody_reads()
    import minilora.training.loop
    assert minilora.training.loop.memory_mb() == minilora.training.loop.memory_mb(peak=True) == 0.0
    import minilora.job.finetune
    sys.exit(main(["train", "--stepz", "3"]))
"""


def test_what_windows_lacks_is_not_needed():
    pytest.importorskip("transformers")
    done = child("-c", textwrap.dedent(WINDOWS))
    assert done.returncode == 2 and done.stderr.startswith("minilora: --stepz: unknown flag; the closest are '--steps'")


@pytest.mark.parametrize("module", ["minilora", "minilora.cli"])
def test_it_runs_as_a_module(module):
    done = child("-m", module, "--version")
    assert (done.returncode, done.stdout) == (0, f"minilora {minilora.__version__}\n")


def test_the_script_of_the_project_is_main():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'minilora = "minilora.cli:main"' in text and callable(minilora.cli.main)

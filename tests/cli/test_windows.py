"""What Windows lacks is hidden from a fresh process, which then does what a user of Windows does. Nothing here was run on Windows."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import minilora

ROOT = Path(minilora.__file__).parents[1]
# Other libraries know Windows in their own way, so they are imported before it is hidden that this is Linux. Then go the modules, signals,
# functions and flags of Unix, and the streams get the code page of a Western Windows.
HIDE = """
    import io, os, select, signal, sys, tempfile, shutil, subprocess
    import numpy, torch

    if sys.argv[1] == "with transformers":
        import accelerate, matplotlib.figure, peft, rich.progress, transformers
        transformers.Trainer, transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM, transformers.AutoTokenizer

    for name in ("resource", "fcntl", "termios", "tty", "pty", "pwd", "grp"):
        sys.modules[name] = None  # importing it raises ImportError
    for name in ("SIGALRM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGKILL", "SIGXCPU", "SIGPIPE", "SIGCHLD", "SIGCONT", "SIGTSTP"):
        delattr(signal, name)
    for name in ("alarm", "setitimer", "pthread_sigmask", "sigwait", "pause"):
        delattr(signal, name)
    for name in ("fork", "register_at_fork", "O_NOFOLLOW", "O_DIRECTORY", "O_NONBLOCK", "getuid", "getgid", "geteuid", "mkfifo",
                 "sched_getaffinity", "listxattr", "getxattr", "pread", "pwrite", "statvfs", "uname", "sysconf", "nice", "killpg",
                 "getpgid", "setsid", "chown", "fchmod", "fchown", "fdatasync", "getloadavg", "waitstatus_to_exitcode"):
        if hasattr(os, name):
            delattr(os, name)
    del select.poll
    os.supports_dir_fd = os.supports_fd = os.supports_follow_symlinks = set()
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="cp1252")
    sys.stderr = io.TextIOWrapper(sys.stderr.buffer, encoding="cp1252", errors="backslashreplace")
"""


def on_windows(source, *words, libraries="torch alone", timeout=500):
    command = [sys.executable, "-c", textwrap.dedent(HIDE) + textwrap.dedent(source), libraries, *map(str, words)]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=timeout)
    assert done.returncode == 0, done.stderr.decode("cp1252")
    return done.stdout.decode("cp1252")


@pytest.mark.slow
def test_every_module_is_imported():
    for name in ("transformers", "peft", "accelerate", "matplotlib", "rich"):
        pytest.importorskip(name)
    said = on_windows(
        """
        import importlib, pkgutil, minilora
        names = [found.name for found in pkgutil.walk_packages(minilora.__path__, "minilora.")]
        print(len([importlib.import_module(name) for name in names if not name.endswith("__main__")]))
        """,
        libraries="with transformers",
    )
    assert int(said) > 100


def test_every_help_is_printed():
    said = on_windows("""
        from minilora.cli import COMMANDS, main
        for words in ([], *([command] for command in COMMANDS)):
            try:
                main([*words, "--help"])
            except SystemExit as ended:
                assert not ended.code
    """)
    assert said.count("usage:") == 21 and "--trust-remote-code" in said


def test_an_adapter_is_saved_and_loaded(tmp_path):
    said = on_windows(
        """
        import torch, minilora
        from torch import nn

        def made():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 3))

        folder = sys.argv[2] + "/adapter"
        model = minilora.inject(made(), minilora.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1) if parameter.requires_grad else None
        for _ in range(2):  # anew, and over what is there
            digest = minilora.save_adapter(model, folder)
        again = made()
        minilora.load_adapter(again, folder, expect_sha256=digest)
        assert torch.equal(again(torch.ones(6)), model(torch.ones(6)))
        print(sorted(os.listdir(folder)), os.listdir(sys.argv[2]))
        """,
        tmp_path,
    )
    assert said.split("] [")[0].count("'") == 6 and said.strip().endswith("['adapter']")


@pytest.mark.slow
def test_a_run_is_trained_and_gone_on_with(tmp_path, model_folder):
    """The whole command: chat template, training, checkpoints, report; then ``--resume``, and an answer."""
    pytest.importorskip("transformers")
    (tmp_path / "data.jsonl").write_text(
        '{"prompt": "hi", "completion": "yo"}\n{"prompt": "who?", "completion": "me"}\n'
    )
    said = on_windows(
        """
        from minilora.cli import main
        out, model = sys.argv[2] + "/run", sys.argv[3]
        words = ["train", "--model", model, "--data", sys.argv[2] + "/data.jsonl", "--out", out, "--batch-size", "1", "--eval-share", "0"]
        words += ["--steps", "2", "--save-every", "1", "--max-length", "64", "--prompts", "hi", "--max-new-tokens", "2"]
        assert main(words) == 0
        shutil.rmtree(out + "/checkpoint-2")
        assert main([*words, "--resume"]) == 0
        assert main(["generate", "--model", model, "--adapter", out, "--max-new-tokens", "2", "hi"]) == 0
        print(sorted(os.listdir(out)))
        """,
        tmp_path,
        model_folder,
        libraries="with transformers",
    )
    assert "this system locks no files there" in said and "going on after step 1" in said and "'report.html'" in said


def test_what_is_hidden_is_hidden():
    """Or the tests above would show nothing."""
    said = on_windows("""
        print([name for name in ("O_NOFOLLOW", "fork", "register_at_fork") if hasattr(os, name)], hasattr(signal, "SIGALRM"))
        try:
            import fcntl
        except ImportError:
            print("no fcntl", sys.stdout.encoding)
    """)
    assert said.split("\n")[:2] == ["[] False", "no fcntl cp1252"]

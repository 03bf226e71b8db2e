"""Data files that are no data: pipes, devices, lines without an end, depths without a bottom; and texts that would steer a terminal."""

import io
import json
import os
import re
import time
import tracemalloc
from types import SimpleNamespace

import pytest

from minilora.data.encoding import encode_all
from minilora.data.records import read_jsonl
from minilora.errors import DataError, MiniLoraError, for_terminal
from minilora.training.progress import Progress

HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eb\r\x00\x7f"
STEERS = set("\x00\x07\x1b\x7f\x9b\u202e\r")


@pytest.mark.parametrize(
    "kind", ["pipe", "zero", "random", "null", "folder", "link to a pipe", "link to itself", "missing"]
)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, kind):
    place = tmp_path / "data.jsonl"
    make = {
        "pipe": lambda: os.mkfifo(place),
        "zero": lambda: place.symlink_to("/dev/zero"),
        "random": lambda: place.symlink_to("/dev/urandom"),
        "null": lambda: place.symlink_to("/dev/null"),
        "folder": place.mkdir,
        "link to a pipe": lambda: (os.mkfifo(tmp_path / "pipe"), place.symlink_to(tmp_path / "pipe")),
        "link to itself": lambda: place.symlink_to(place),
        "missing": lambda: None,
    }
    make[kind]()
    began = time.monotonic()
    with pytest.raises(DataError, match=r"data\.jsonl") as caught:
        read_jsonl(place)
    assert time.monotonic() - began < 2 and str(caught.value).isprintable()


def test_a_line_of_a_gigabyte_takes_no_memory(tmp_path):
    """A sparse file, which takes no room on the disk."""
    place = tmp_path / "data.jsonl"
    with place.open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(1 << 30)
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(DataError, match="longer than 16,000,000 bytes"):
            read_jsonl(place)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 80_000_000 and time.process_time() - began < 4


RAW = {
    "depth": b'{"text": ' + b"[" * 1_000_000,
    "depth of objects": b'{"a":' * 200_000,
    "depth that closes": b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}",
    "digits": b'{"text": ' + b"9" * 1_000_000 + b"}",
    "NUL": b"\x00" * 1_000_000,
    "NUL in a text": b'{"text": "a\x00b"}',
    "no UTF-8": b'{"text": "\xff\xfe"}',
    "UTF-16": '{"text": "a"}'.encode("utf-16"),
    "half a pair": b'{"text": "\\ud800"}',
    "half a pair in a key": b'{"text": "a", "\\ud800": 1, "weights": 2}',
    "a key twice": b'{"text": "a", "text": "b"}',
    "many keys": json.dumps({f"k{at}": at for at in range(100_000)}).encode(),
    "a long key": json.dumps({"k" * 1_000_000: 1}).encode(),
    "a key that steers": json.dumps({HOSTILE: 1}).encode(),
    "a role that steers": json.dumps({"messages": [{"role": HOSTILE, "content": "a"}, {"role": "assistant", "content": "b"}]}).encode(),
    "a field that steers": json.dumps({"prompt": "a", "completion": "b", "chat_template_kwargs": {HOSTILE: HOSTILE}}).encode(),
    "an option without an end": json.dumps({"prompt": "a", "completion": "b", "chat_template_kwargs": {"k" * 9_000: 1}}).encode(),
    "a form that steers": json.dumps([HOSTILE]).encode(),
}  # fmt: skip


@pytest.mark.parametrize("case", RAW)
def test_a_line_of_any_bytes_is_one_line_of_an_error(tmp_path, case, byte_tokenizer):
    place = tmp_path / "data.jsonl"
    place.write_bytes(b'{"text": "a good line"}\n' + RAW[case] + b"\n")
    began = time.process_time()
    with pytest.raises(DataError, match=r"data\.jsonl:2") as caught:
        encode_all(read_jsonl(place), byte_tokenizer(), 64)
    assert time.process_time() - began < 4  # 2 s where nothing else runs
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1_300


# ---- what reaches a terminal


class Terminal(io.StringIO):
    """A stream that is a terminal, in the encoding that it says."""

    def __init__(self, encoding="utf-8"):
        super().__init__()
        self.said = encoding

    encoding = property(lambda self: self.said)

    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_answers_that_steer_nothing(terminal):
    stream = Terminal() if terminal else io.StringIO()
    with Progress(3, stream) as progress:
        progress.watch({"step": 1, "eval_loss": 1.0, "prompt": HOSTILE, "answer": HOSTILE + "\n\ud800"})
        progress.watch({"step": 1, "skipped": HOSTILE, "seconds": 1.0})
        progress.say(HOSTILE + "\ud800")
    shown = stream.getvalue()
    assert shown.count("owned") == 4 and "\\ud800" in shown
    mine = re.sub(r"\x1b\[(\?25[lh]|2K|1A|[\d;]*m)|\r", "", shown)  # the bar is moved and coloured by rich
    assert not STEERS & set(mine)


def test_an_answer_and_a_prompt_are_shown_as_text(monkeypatch, capsys, tmp_path):
    pytest.importorskip("transformers")
    from minilora.cli.jobs import run_job

    (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
    answers = [{"prompt": HOSTILE, "before": HOSTILE, "after": HOSTILE + "\ud800"}]
    outcome = SimpleNamespace(answers=answers, losses=[1.0], seconds={"all": 1.0}, peak_mb=0.0, folder=tmp_path)
    monkeypatch.setattr("minilora.job.finetune.fine_tune", lambda job: outcome)
    run_job(SimpleNamespace(training=SimpleNamespace(steps=1), dry_run=False))
    said = capsys.readouterr().out
    assert said.count("owned") == 3 and not STEERS & set(said) and "\\ud800" in said


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_stream_that_lacks_a_sign_gets_it_written_out(encoding):
    """As on Windows, where a stream need not be UTF-8: printing never fails."""
    text = for_terminal("é█👩\ud800\x1b", encoding)
    text.encode(encoding)
    assert text.endswith("\\ud800\\x1b") and (encoding != "utf-8" or text.startswith("é█👩"))
    assert encoding != "ascii" or text.startswith("\\xe9\\u2588")


def test_an_error_about_data_is_a_line_of_any_terminal():
    error = MiniLoraError(f"{HOSTILE}\n\ud800\u2028")
    assert str(error).isprintable() and "owned" in str(error)

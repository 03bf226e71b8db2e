"""A run folder of somebody who knows the format and hashes what was changed anew: it is refused in a line, or gone on with rightly."""

import hashlib
import json
import os
import random
import shutil
import time
import tracemalloc

import pytest
import torch

from minilora import LoraConfig, inject
from minilora.data.encoding import Encoded
from minilora.data.tokens import IGNORED
from minilora.errors import CheckpointError, MiniLoraError
from minilora.files.parse import LONGEST_JSON, parse_tensors, tensor_bytes
from minilora.report.page import render
from minilora.training import checkpoint
from minilora.training.checkpoint import OPTIMIZER_FILE, STATE_FILE, WEIGHTS_FILE, read_checkpoint
from minilora.training.left import LOG_FILE, kept_records
from minilora.training.loop import TrainConfig, train
from minilora.training.resume import newest
from tests.hostile import nested
from tests.models import Words

PAD, STEPS, AT = 40, 4, 2
FIELDS = {"steps": STEPS, "batch_size": 2, "lr": 0.02, "save_every": 1, "keep_checkpoints": 9}
EXAMPLES = [Encoded((at, 7, 3, at + 5, 9), (IGNORED, 7, 3, at + 5, 9)) for at in range(5)]


def fresh():
    torch.manual_seed(1)
    return inject(Words(), LoraConfig(r=3, lora_alpha=5, target_modules=["mid", "head"]))


def go(model, folder, said, **more):
    return train(model, EXAMPLES, TrainConfig(**FIELDS), folder, PAD, EXAMPLES[:1], say=said.append, **more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody has touched."""
    folder = tmp_path_factory.mktemp("whole")
    go(fresh(), folder, [])
    return folder


@pytest.fixture
def place(whole, tmp_path):
    """The run's folder after its second step: ``log.jsonl`` and one checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copytree(whole / f"checkpoint-{AT}", folder / f"checkpoint-{AT}")
    shutil.copy(whole / LOG_FILE, folder)
    return folder


def seal(folder, change=None):
    """Hash everything anew, after ``change(state)``, as whoever knows the format can do."""
    file = folder / STATE_FILE
    state = json.loads(file.read_text())
    state["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in state["files"]}
    if change:
        change(state)
    file.write_bytes(checkpoint._state_bytes(state))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outcome(folder, whole, snapshot):
    """ "right" if the run ends as nobody had touched it, "refused" if it is refused as it should be; all else fails."""
    model, said, before = fresh(), [], contents(folder)
    state = snapshot(model)
    began = time.process_time()
    try:
        go(model, folder, said, resume=True)
    except MiniLoraError as error:
        lines = [str(error), *said]
        assert time.process_time() - began < 4  # 2 s where nothing else runs
        assert snapshot(model) == state and contents(folder) == before
        result = "refused"
    else:
        lines, result = said, "right"
        for name in (WEIGHTS_FILE, "adapter_config.json"):
            assert (folder / name).read_bytes() == (whole / name).read_bytes()
    for line in lines:
        assert line.isprintable() and len(line.replace(str(folder), "")) < 500, line
    return result


# ---- the state of the run


HOSTILE = [
    10**400, 2**63, -1, 0, 1, 1.0, True, False, None, 0.5, 1e300, float("nan"), float("inf"), "", "x" * 5_000, "9" * 4_000,
    "a\nb\x1b[2J\x07\u202e\u2028", "\ud800", "../../etc/passwd", [], {}, [[]], nested(15), nested(400), [None] * 1_000,
    {f"k{at}": at for at in range(20_000)}, {"a\x1b]0;x\x07\n": 1}, {"\x00" * 2_000: "\n" * 2_000}, [[2**40, 0]],
]  # fmt: skip


def places(value, path=()):
    """Paths of everything in a JSON value."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))


def put(state, path, value):
    *outer, last = path
    for key in outer:
        state = state[key]
    state[last] = value


def test_every_field_of_a_state_with_every_hostile_value(place, whole, snapshot):
    """Each field with some values, drawn from a seed; a field that says what must be equal, or a form, refuses all of them."""
    draw, file = random.Random(13), place / f"checkpoint-{AT}" / STATE_FILE
    original = file.read_bytes()
    paths = [path for path in places(json.loads(original)) if path and path[-1] != "sha256"]
    found = {"right": 0, "refused": 0}
    shutil.copytree(place, again := place.with_name("again"))
    for path in paths:
        for value in draw.sample(HOSTILE, 2):
            seal(place / f"checkpoint-{AT}", lambda state, path=path, value=value: put(state, path, value))
            result = outcome(place, whole, snapshot)
            found[result] += 1
            if result == "right":  # only what may be of another machine, or is a note, changes nothing
                assert path[:2] in {("meaning", "bits"), ("meaning", "notes")} or original == file.read_bytes(), path
                shutil.rmtree(place)
                shutil.copytree(again, place)
            file.write_bytes(original)
    assert found["refused"] > 40 and outcome(place, whole, snapshot) == "right", found


@pytest.mark.parametrize("part", ["training", "adapter", "data", "base", "bits", "notes", "more"])
def test_keys_that_are_added_or_missing(place, whole, snapshot, part):
    folder = place / f"checkpoint-{AT}"
    shutil.copytree(place, again := place.with_name("again"))
    for change in (
        lambda state: state["meaning"].setdefault(part, {}).update({"\x1b[2J\n" * 300: "\n" * 900}),
        lambda state: state["meaning"].pop(part, None),
        lambda state: state["meaning"].update({part: [part]}),
    ):
        seal(folder, change)
        outcome(place, whole, snapshot)
        shutil.rmtree(place)
        shutil.copytree(again, place)


@pytest.mark.parametrize("step", [0, -1, True, 2.0, STEPS + 1, 10**17, None, "2"])
def test_a_step_that_was_not_done(place, whole, snapshot, step):
    """Also where the folder is named for it: a run does not end because a checkpoint says that it has."""
    name = place / f"checkpoint-{step if type(step) is int else AT}"
    (place / f"checkpoint-{AT}").rename(name)
    seal(name, lambda state: state.update(step=step))
    if type(step) is int and step < 1:  # a name that no checkpoint has: nothing to go on with, so from the start
        assert newest(place, pytest.fail) is None
    else:
        assert outcome(place, whole, snapshot) == "refused"


def test_a_state_of_a_million_entries(place, whole, snapshot):
    """As long as it is read at all, and longer. Memory follows the file's size."""
    folder = place / f"checkpoint-{AT}"
    for count in (300_000, 1_200_000):
        seal(folder, lambda state, count=count: state["meaning"]["training"].update(many=list(range(count))))
        assert (os.path.getsize(folder / STATE_FILE) > LONGEST_JSON) == (count > 500_000)
        assert outcome(place, whole, snapshot) == "refused"
        tracemalloc.start()
        try:
            newest(place, lambda line: None)
        except CheckpointError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 30 * os.path.getsize(folder / STATE_FILE)


@pytest.mark.parametrize(
    "text",
    ['{"version":' * 5_000, "[" * 100_000, "9" * 5_000, '{"step":' + "9" * 5_000 + "}", "null", "", "\x00" * 9, "{}"],
)
def test_a_state_that_is_none(place, whole, snapshot, text):
    (place / f"checkpoint-{AT}" / STATE_FILE).write_text(text)
    assert outcome(place, whole, snapshot) == "refused"


# ---- its tensors


def change_tensors(place, name, change):
    """``change(tensors)`` in a file of the checkpoint, which is hashed anew."""
    file = place / f"checkpoint-{AT}" / name
    tensors, metadata = parse_tensors(bytearray(file.read_bytes()), file)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    file.write_bytes(tensor_bytes(tensors, metadata))
    seal(file.parent)


def first(tensors, kind):
    return next(key for key in tensors if key.startswith(kind))


VALUES = [
    ("exp_avg/", float("nan")), ("exp_avg/", float("-inf")), ("exp_avg_sq/", -1e-9), ("exp_avg_sq/", float("inf")), ("step/", 0.0),
    ("step/", -1.0), ("step/", 1.5), ("step/", AT + 1.0), ("step/", 1e30), ("step/", float("nan")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), VALUES)
def test_an_optimizer_s_state_that_no_run_leaves(place, whole, snapshot, kind, value):
    change_tensors(place, OPTIMIZER_FILE, lambda tensors: tensors[first(tensors, kind)].fill_(value))
    assert outcome(place, whole, snapshot) == "refused"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(place, whole, snapshot, value):
    change_tensors(place, WEIGHTS_FILE, lambda tensors: tensors[first(tensors, "base")].view(-1)[0].fill_(value))
    assert outcome(place, whole, snapshot) == "refused"


def renamed(tensors, name):
    tensors[name] = tensors.pop(first(tensors, ""))


TENSORS = {
    "one less": lambda tensors: tensors.pop(first(tensors, "")),
    "none": lambda tensors: tensors.clear(),
    "another name": lambda tensors: renamed(tensors, "x" * 5_000),
    "another shape": lambda tensors: tensors.update({first(tensors, ""): torch.zeros(7, 3)}),
    "no element": lambda tensors: tensors.update({first(tensors, ""): torch.zeros(0, 2**32)}),
    "integers": lambda tensors: tensors.update({first(tensors, ""): torch.ones(3, dtype=torch.int64)}),
    "bools": lambda tensors: tensors.update({first(tensors, ""): torch.ones(3, dtype=torch.bool)}),
    "float64": lambda tensors: tensors.update({k: t.double() for k, t in tensors.items()}),
    "many": lambda tensors: tensors.update({f"exp_avg/{at}": torch.zeros(0) for at in range(30_000)}),
    "of nothing": lambda tensors: tensors.update(
        {"/": torch.zeros(1), "step/": torch.ones(()), "exp_avg/": torch.ones(1)}
    ),
}


@pytest.mark.parametrize("file", [WEIGHTS_FILE, OPTIMIZER_FILE])
@pytest.mark.parametrize("case", TENSORS)
def test_other_tensors_than_the_model_has(place, whole, snapshot, file, case):
    change_tensors(place, file, TENSORS[case])
    assert outcome(place, whole, snapshot) == "refused"


HEADERS = {
    "a shape that no tensor has": {"shape": [2**32, 2**32]},
    "a product of nothing": {"shape": [0, 2**47, 2**47]},
    "negative": {"shape": [-1, -36]},
    "a whole number of 4,000 digits": {"shape": [10**4_000]},
    "offsets past the end": {"data_offsets": [0, 2**47]},
    "dtype": {"dtype": "\x1b[2J\n" * 900},
    "nested": {"shape": nested(400)},
}


@pytest.mark.parametrize("file", [WEIGHTS_FILE, OPTIMIZER_FILE])
@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(place, whole, snapshot, file, case):
    path = place / f"checkpoint-{AT}" / file
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[next(key for key in header if key != "__metadata__")] |= HEADERS[case]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    seal(path.parent)
    assert outcome(place, whole, snapshot) == "refused"


def test_an_older_checkpoint_is_taken_where_the_newest_is_hostile(place, whole, tmp_path):
    shutil.copytree(whole / "checkpoint-1", place / "checkpoint-1")
    change_tensors(place, OPTIMIZER_FILE, lambda tensors: tensors[first(tensors, "exp_avg_sq")].fill_(-1.0))
    said = []
    go(fresh(), place, said, resume=True)
    assert "holds what no run leaves" in said[0] and said[1].startswith("going on after step 1")
    assert (place / WEIGHTS_FILE).read_bytes() == (whole / WEIGHTS_FILE).read_bytes()


def test_files_that_are_none(place, whole, snapshot, tmp_path):
    for name in (STATE_FILE, WEIGHTS_FILE, OPTIMIZER_FILE, "adapter_config.json"):
        file = place / f"checkpoint-{AT}" / name
        kept = file.read_bytes()
        file.unlink()
        for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
            make(file)
            with pytest.raises(CheckpointError, match="cannot be read") as caught:
                read_checkpoint(file.parent, AT)
            assert str(caught.value).isprintable()
            file.rmdir() if file.is_dir() else file.unlink()
        file.write_bytes(kept)
    assert outcome(place, whole, snapshot) == "right"


def test_recomputing_activations_is_not_begun_before_the_checkpoint_is_accepted(place, whole, make_llama, snapshot):
    config = TrainConfig(**FIELDS, gradient_checkpointing=True)
    model = inject(make_llama(0), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    before = model.is_gradient_checkpointing
    with pytest.raises(CheckpointError, match="another adapter"):
        train(model, EXAMPLES, config, place, PAD, EXAMPLES[:1], resume=True, say=lambda line: None)
    assert model.is_gradient_checkpointing == before is False


# ---- its log


LINES = [
    '{"step": 1, "loss": NaN}', '{"step": 1, "loss": Infinity}', '{"step": 1, "loss": null}', '{"step": 1, "loss": true}',
    '{"step": -1, "loss": 1.0}', '{"step": true, "loss": 1.0}', '{"step": 1, "lr": ' + "9" * 400 + "}", '{"step": 1, "lr": 1e999}',
    '{"step": 1, "seconds": NaN}', '{"step": 1, "seconds": -5.0}', '{"step": 1, "seconds": 3}', '{"step": 1, "eval_loss": "x"}',
    '{"step": 1, "prompt": 3}', '{"step": 1, "answer": ["a"]}', '{"step": 1, "more": {"a": 1}}', '{"step": ' + "9" * 5_000 + "}",
    "[" * 50_000, '{"a":' * 20_000, "\x00\x1b[2J", "null", "[]", '{"loss": 1.0}', '{"step": 1, "step": 1}', '{"step": 10e1}',
    '{"step": 9223372036854775808, "loss": 1.0}',
]  # fmt: skip


def test_lines_of_a_log_that_no_run_writes_are_left_out(place, whole, snapshot):
    log = place / LOG_FILE
    mine = log.read_text()
    wanted = kept_records(place, AT)
    log.write_text("".join(f"{line}\n" for line in LINES) + mine)
    assert kept_records(place, AT) == wanted and wanted
    assert outcome(place, whole, snapshot) == "right"


def test_what_is_kept_of_a_log_can_be_drawn(place):
    """Numbers that are odd and can be drawn, texts of any sign: the report is made all the same, and holds no markup of theirs."""
    lines = [
        {"step": 0, "eval_loss": None, "prompt": "<script>", "answer": "\x1b[2J\ud800\n\x00" * 50},
        {"step": 1, "loss": 1e299, "lr": -1e299, "grad_norm": 10**200, "seconds": 1e299, "tokens": 0},
        {"step": 1, "loss": 0, "rss_mb": -5, "tokens_per_s": 5e-324, "unknown": 1},
        {"step": 2, "skipped": "</title>" * 900, "seconds": 0.0},
    ]
    (place / LOG_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    records = kept_records(place, AT)
    assert records == json.loads(json.dumps(lines))
    evals = [r | {"loss": r["eval_loss"]} for r in records if "eval_loss" in r]
    page = render({"title": "run", "steps": [r for r in records if "loss" in r], "evals": evals})
    assert "<script>" not in page and "\x1b" not in page and page.encode()


def test_a_log_of_one_endless_line_is_read_in_bounded_memory(place):
    with (place / LOG_FILE).open("r+b") as log:
        log.truncate(200_000_000)  # a sparse file: zeros, and no line end
    tracemalloc.start()
    try:
        records = kept_records(place, AT)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert records and peak < 80_000_000


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_log_that_is_no_file_is_not_waited_for(place, make):
    (place / LOG_FILE).unlink()
    make(place / LOG_FILE)
    assert kept_records(place, AT) == []

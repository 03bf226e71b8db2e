"""Jobs of the tiny model, which the tests of this room run."""

import json
import signal

import pytest

from minilora.job.settings import Job
from minilora.training.loop import TrainConfig
from tests.job.asked import LORA, SYSTEM


@pytest.fixture(scope="session")
def make_job(model_folder, tmp_path_factory):
    """A job of the tiny model on data with a system turn; what is given changes it."""
    data = tmp_path_factory.mktemp("data") / "d.jsonl"
    turns = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "The lamp is lit."},
    ]
    with open(data, "w", encoding="utf-8") as file:
        for number in range(1, 10):
            turns[1]["content"], turns[2]["content"] = f"How {number}?", f"The lamp{'!' * number}"
            file.write(json.dumps({"messages": turns}) + "\n")

    def make(out, steps=3, training=None, **fields):
        training = TrainConfig(**{"steps": steps, "batch_size": 2, "lr": 0.02, "seed": 5, **(training or {})})
        fields = {"prompts": ("What?", "Who are you?"), "max_new_tokens": 9, "device": "cpu", "lora": LORA, **fields}
        return Job(**{"model": model_folder, "data": str(data), "out": str(out), "training": training, **fields})

    return make


@pytest.fixture(autouse=True)
def plain_signals():
    """A shell may start the tests with Ctrl-C ignored, which a run would respect."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def quiet_libraries():
    """What the command line asks of libraries before it imports them; here they are imported already."""
    transformers = pytest.importorskip("transformers")
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    yield
    if shown:
        transformers.utils.logging.enable_progress_bar()

"""A trace holds the steps that were asked for, and recording them changes none."""

import json

import pytest
import torch

from minilora import LoraConfig, inject
from minilora.data.encoding import Encoded
from minilora.training.loop import TrainConfig, train
from tests.models import Words

EXAMPLES = [Encoded((4, 5, 6, 7), (4, 5, 6, 7)), Encoded((9, 8, 7), (9, 8, 7))]


def run(folder, profile, steps=4, **options):
    torch.manual_seed(0)
    model = inject(Words(), LoraConfig(r=2, lora_alpha=5, target_modules=["mid", "head"]))
    config = TrainConfig(steps=steps, batch_size=2, save_every=2, profile=profile)
    train(model, EXAMPLES, config, folder, 0, say=lambda line: None, **options)
    return (folder / "adapter_model.safetensors").read_bytes()


def recorded(folder):
    """The steps of the trace, and the names of all that was computed."""
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    names = {event["name"] for event in events if event.get("ph") == "X"}
    return sorted(name for name in names if name.startswith("step ")), names


@pytest.mark.parametrize(
    ("steps", "profile", "wanted"),
    [(4, 2, ["step 2", "step 3"]), (4, 1, ["step 2"]), (3, 9, ["step 2", "step 3"]), (1, 1, ["step 1"])],
)
def test_the_steps_that_were_asked_for_are_in_the_trace(tmp_path, steps, profile, wanted):
    run(tmp_path, profile, steps)
    found, names = recorded(tmp_path)
    assert found == wanted and "aten::mm" in names


def test_what_was_recorded_before_a_run_broke_is_written(tmp_path):
    def breaks(record):
        if record["step"] == 3:
            raise ValueError("the watcher")

    with pytest.raises(ValueError, match="the watcher"):
        run(tmp_path, 9, steps=8, watch=breaks)
    assert "step 2" in recorded(tmp_path)[0]


def test_recording_changes_nothing(tmp_path):
    assert run(tmp_path / "traced", 2) == run(tmp_path / "plain", 0)
    assert not (tmp_path / "plain" / "trace.json").exists()


def test_a_run_that_is_begun_anew_takes_its_trace_away(tmp_path):
    run(tmp_path, 1)
    run(tmp_path, 0, overwrite=True)
    assert not (tmp_path / "trace.json").exists()

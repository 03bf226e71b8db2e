"""Trackers of experiments: the numbers of a run go to TensorBoard, Weights & Biases, Trackio or MLflow, beside its log.

Each is an optional package behind three calls: ``start``, ``log``, ``finish``. What goes wrong in one of them in the middle of a run is
said once, and the run goes on. Next file: ``job/outcome.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from minilora.errors import MissingPackageError
from minilora.job.settings import TRACKER_NAMES

__all__ = ["TRACKERS", "Tracker", "Trackers", "refuse_missing"]

_PROJECT = "minilora"
_LONGEST = 500  # signs of a setting that MLflow takes


class Tracker(Protocol):
    """What a tracker is asked to do."""

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """Begin, or go on: ``step`` is the first that will be logged; ``folder`` is the run's, whose name is the run's name."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of one step, under names such as ``train/loss``."""

    def finish(self) -> None:
        """The run is over."""


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder; what an earlier run wrote there of the same steps is hidden."""

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        self._writer.add_text("settings", "".join(f"    {key}: {value}\n" for key, value in settings.items()), step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases; its own environment variables say where it goes (WANDB_PROJECT, WANDB_MODE ...)."""

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        wandb = importlib.import_module("wandb")
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        self._run = wandb.init(project=project, name=folder.name, dir=str(folder), config=dict(settings))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def finish(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio, which keeps it on this computer unless its environment says otherwise (TRACKIO_PROJECT, TRACKIO_SPACE_ID)."""

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        self._trackio = importlib.import_module("trackio")
        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        self._trackio.init(project=project, name=folder.name, config=dict(settings))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._trackio.log(dict(numbers), step=step)

    def finish(self) -> None:
        self._trackio.finish()


class MLflow:
    """A run of MLflow; its own environment variables say where it goes (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME)."""

    def start(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        self._mlflow = importlib.import_module("mlflow")
        self._mlflow.start_run(run_name=folder.name)
        self._mlflow.log_params({key: str(value)[:_LONGEST] for key, value in settings.items()})

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        # One of its names may hold letters, digits and a few signs, "/" among them.
        self._mlflow.log_metrics(dict(numbers), step=step)

    def finish(self) -> None:
        self._mlflow.end_run()


# How each is made, by the name of its package.
TRACKERS: dict[str, Callable[[], Tracker]] = dict(
    zip(TRACKER_NAMES, (TensorBoard, WandB, Trackio, MLflow), strict=True)
)


def refuse_missing(names: Sequence[str]) -> None:
    """Raise ``MissingPackageError`` for a tracker whose package is not installed, before anything is loaded."""
    for name in names:
        if not _is_there(name):
            raise MissingPackageError(f"report_to={name!r}: {name} is not installed; run 'pip install {name}'")


def _is_there(package: str) -> bool:
    try:
        return sys.modules.get(package) is not None or importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a specification
        return False


class Trackers:
    """The trackers of one run; made by the first process alone. They begin with the first record, so a job that is refused leaves nothing.

    Args:
        names: of ``TRACKERS``. folder: the run's. settings: what the run is, as the report shows it. say: gets a line for what fails.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self._going: dict[str, Tracker] = {name: TRACKERS[name]() for name in names}
        self._folder, self._settings, self._say, self._begun = folder, settings, say, False

    def log(self, record: Mapping[str, Any]) -> None:
        """One record of ``train``, whose texts are left out."""
        step = record["step"]
        if not self._begun:
            self._begun = True
            self._each(lambda tracker: tracker.start(self._folder, self._settings, step))
        if numbers := _numbers(record):
            self._each(lambda tracker: tracker.log(step, numbers))

    def finish(self) -> None:
        """End those that have begun."""
        if self._begun:
            self._each(lambda tracker: tracker.finish())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._going.items()):
            try:
                call(tracker)
            except Exception as error:  # of a server, a network, a disk
                del self._going[name]
                said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                self._say(f"{name} gets no more of this run, which goes on: {said}")


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Name to number of a record."""
    if "eval_loss" in record:
        return {} if record["eval_loss"] is None else {"eval/loss": record["eval_loss"]}
    if "skipped" in record:
        return {"train/skipped": 1.0}
    return {f"train/{name}": value for name, value in record.items() if name != "step"}

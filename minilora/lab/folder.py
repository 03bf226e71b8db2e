"""The folder of a sweep: a table of its trials, a log, an adapter for each, and the state that it goes on from.

    sweep.json         what the sweep is: its trials, data and base; a state of another one is refused
    state.safetensors  weights and optimizer state of the trials that go; state.json: where each trial is, and the digest of the former
    runs.csv           a row a trial: its settings, losses, what was measured
    log.jsonl          a line a step and an evaluation, with the name of the trial
    report.html        figures, table and verdict, and sweep-*.svg where figures were asked for: written by ``lab/report.py``
    <trial>/           its adapter, which minilora and PEFT open

The state is written as one step, so all trials in it are at the same one. Next file: ``lab/table.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from minilora.data.encoding import Encoded
from minilora.data.examples import digests
from minilora.errors import CheckpointError, ConfigError, Interrupted, MiniLoraError
from minilora.files.parse import parse_json, parse_tensors
from minilora.files.read import read_bytes, refuse_path
from minilora.files.write import append_line, remove, write_file, write_files
from minilora.lab.going import Going
from minilora.lab.table import as_csv, described
from minilora.lab.trial import Result
from minilora.linear.layers import kind_of
from minilora.lora.slots import adapters_of
from minilora.store.adapter_files import CONFIG_FILE, SEAL_FILE, WEIGHTS_FILE
from minilora.store.fingerprint import fingerprint
from minilora.store.save import adapter_files
from minilora.training.lock import held, refuse_held
from minilora.training.optim_state import form_of, put_state, state_form, state_tensors
from minilora.training.signals import Wish

__all__ = ["CSV_FILE", "FIGURES", "KINDS", "REPORT_FILE", "SWEEP_FILE", "SweepFolder"]

SWEEP_FILE, STATE_FILE, WHERE_FILE, CSV_FILE, LOG_FILE = (
    "sweep.json", "state.safetensors", "state.json", "runs.csv", "log.jsonl")  # fmt: skip
REPORT_FILE, FIGURES, KINDS = "report.html", ("sweep-rates", "sweep-regret", "sweep-frontier"), ("png", "svg", "pdf")
_DRAWN = [f"{name}.{kind}" for name in FIGURES for kind in KINDS]  # by ``lab/report.py``
_OWN = (SWEEP_FILE, STATE_FILE, WHERE_FILE, CSV_FILE, LOG_FILE, REPORT_FILE, *_DRAWN)
_ANEW = "restore it, or begin anew with --overwrite (overwrite=True)"
_KNOWN = ("ended", "seconds", "measured", "alone", "parameters")  # of a result, in the state
_ADAPTER = (WEIGHTS_FILE, CONFIG_FILE, SEAL_FILE)


class SweepFolder:
    """What of a sweep lies on disk; with ``path`` None, nothing does.

    Args:
        results: by name of the trial, filled while the sweep goes. data: examples and evaluation. every: steps between states.
    """

    def __init__(
        self,
        path: str | Path | None,
        results: Mapping[str, Result],
        data: Sequence[Sequence[Encoded]],
        model: nn.Module,
        every: int,
        watch: Callable[[str, dict[str, Any]], None] | None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.results, self.every, self.watch = results, every, watch
        self.steps = 0
        self.said: set[str] = set()
        self.told: dict[str, int] = {}  # records of a trial that are in the log
        self.kept: dict[str, Any] = {}  # where each trial was in the state that is gone on from
        self.tensors: dict[str, Tensor] = {}
        if self.path is not None:
            trials = {name: described(result.trial) for name, result in results.items()}
            hashes = [hashlib.sha256(b"".join(digests(examples))).hexdigest() for examples in data]
            linears = [path for path, module in model.named_modules() if kind_of(module) == "linear"]
            self.meaning = json.loads(
                json.dumps({"trials": trials, "data": hashes, "base": fingerprint(model, linears)})
            )

    @contextmanager
    def held(self, resume: bool, overwrite: bool, say: Callable[[str], None]) -> Iterator[None]:
        """The folder, claimed and locked, with its state taken up; nothing where there is none.

        Raises:
            CheckpointError: a sweep lies there and nobody said what to do with it, or its state is damaged or another sweep's.
        """
        if self.path is None:
            if resume or overwrite:
                raise ConfigError("resume and overwrite are about a folder; name one (folder=...)")
            yield
            return
        self._claim(self.path, resume, overwrite)
        with held(self.path, say):
            if resume and (self.path / WHERE_FILE).exists():
                self._take_up(self.path)
                say(f"going on after step {self.steps}: {self.path}")
            else:
                self._clear(self.path)
            write_file(self.path / SWEEP_FILE, json.dumps(self.meaning, indent=1))
            lines = [{"run": name} | record for name, result in self.results.items() for record in result.records]
            write_file(self.path / LOG_FILE, "".join(f"{json.dumps(line)}\n" for line in lines))
            self.told = {name: len(result.records) for name, result in self.results.items()}
            yield

    def _claim(self, path: Path, resume: bool, overwrite: bool) -> None:
        if resume and overwrite:
            raise ConfigError("resume and overwrite are both set; wanted one: go on with the sweep, or begin anew")
        refuse_path(path)
        if path.exists() and not path.is_dir():
            raise ConfigError(f"out={str(path)!r} is a file; wanted a folder for the sweep")
        refuse_held(path)
        lies = next((name for name in _OWN if os.path.lexists(path / name)), None)
        if lies and not (resume or overwrite):
            raise CheckpointError(
                f"{path}: holds a sweep already ({lies}); go on with it by --resume (resume=True), replace it by --overwrite "
                "(overwrite=True), or choose another folder"
            )

    def _clear(self, path: Path) -> None:
        """Remove what a sweep left there: its own files, and the adapters of the trials that it names."""
        known = _read(path / SWEEP_FILE) if (path / SWEEP_FILE).exists() else {}
        for name in known.get("trials", {}):
            if (path / name).is_dir():
                remove(path / name, [file for file in _ADAPTER if os.path.lexists(path / name / file)])
        remove(path, [name for name in _OWN if os.path.lexists(path / name)])

    def _take_up(self, path: Path) -> None:
        then = _read(path / SWEEP_FILE)
        for part, words in (("trials", "trials"), ("data", "data"), ("base", "base model")):
            if then.get(part) != self.meaning[part]:
                raise CheckpointError(
                    f"{path}: a sweep of other {words} lies there; set them back, or begin anew with --overwrite (overwrite=True)"
                )
        where, content = _read(path / WHERE_FILE), read_bytes(path / STATE_FILE, "the state of a sweep")
        if hashlib.sha256(content).hexdigest() != where["sha256"]:
            raise CheckpointError(f"{path / STATE_FILE}: damaged; {_ANEW}")
        self.steps, self.kept = where["steps"], where["trials"]
        self.tensors = safetensors.torch.load(bytes(content))
        logged = self._logged(path)
        for name, position in self.kept.items():
            result = self.results[name]
            result.records = logged.get(name, [])[: position["records"]]
            if len(result.records) < position["records"]:
                raise CheckpointError(
                    f"{path / LOG_FILE}: lacks lines of {name}; restore it, or begin anew with --overwrite (overwrite=True)"
                )
            for key in _KNOWN:
                setattr(result, key, position[key])

    def _logged(self, path: Path) -> dict[str, list[dict[str, Any]]]:
        """The records in the log by trial, up to the first line that is none."""
        found: dict[str, list[dict[str, Any]]] = {}
        for line in read_bytes(path / LOG_FILE, "a log").decode("utf-8", "replace").splitlines():
            try:
                record = json.loads(line)
                found.setdefault(record.pop("run"), []).append(record)
            except (ValueError, KeyError, AttributeError):
                break
        return found

    def finished(self, result: Result) -> bool:
        """Whether the state that is gone on from has its end; its weights are read then, where it left some."""
        if not self.kept.get(result.name, {}).get("finished"):
            return False
        result.finished = True
        if self.path is not None and result.trial.lora is not None and not result.ended:
            place = self.path / result.name / WEIGHTS_FILE
            result.weights, _ = parse_tensors(read_bytes(place, "an adapter"), place)
        return True

    def put(self, goings: Sequence[Going]) -> None:
        """Put trials where the state has them; those that it does not know begin."""
        for going in goings:
            name = going.result.name
            if name not in self.kept or "step" not in self.kept[name]:
                continue
            going.put(self.kept[name])
            own = {key.removeprefix(f"{name}:"): t for key, t in self.tensors.items() if key.startswith(f"{name}:")}
            weights = {key.removeprefix("weight/"): t for key, t in own.items() if key.startswith("weight/")}
            spare = {key.removeprefix("spare/"): t for key, t in own.items() if key.startswith("spare/")}
            state = {key: t for key, t in own.items() if not key.startswith(("weight/", "spare/"))}
            self._refuse_other(going, weights, state)
            with torch.no_grad():
                for path, parameter in going.named.items():
                    parameter.copy_(weights[path])
            going.spare = {path: tensor.to(going.named[path].device) for path, tensor in spare.items()}
            if state:
                put_state(going.optimizer, going.named, state)

    def _refuse_other(self, going: Going, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        wanted = {path: form_of(parameter) for path, parameter in going.named.items()}
        found = {path: form_of(tensor) for path, tensor in weights.items()}
        forms = {
            f"{what}/{path}": form
            for path, p in going.named.items()
            for what, form in state_form(going.optimizer, p).items()
        }
        if wanted != found or any(form_of(tensor) != forms.get(key) for key, tensor in state.items()):
            raise CheckpointError(
                f"{self.path}: the state of {going.result.name} has other weights than its adapter; load the model that it was trained on"
            )

    def once(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """``say``, without what was said before."""

        def new(line: str) -> None:
            if line not in self.said:
                self.said.add(line)
                say(line)

        return new

    def log(self, goings: Sequence[Going]) -> None:
        """Write what is new in their records."""
        for going in goings:
            result = going.result
            for record in result.records[self.told.get(result.name, 0) :]:
                if self.path is not None:
                    append_line(self.path / LOG_FILE, json.dumps({"run": result.name} | record))
                if self.watch:
                    self.watch(result.name, record)
            self.told[result.name] = len(result.records)

    def after_step(self, goings: Sequence[Going]) -> None:
        """A step is done: count it, and save the state where it is time to."""
        self.steps += 1
        if self.every and self.steps % self.every == 0:
            self.save(goings)

    def save(self, goings: Sequence[Going] = ()) -> None:
        """Write the state: of the trials that go, and where the others are."""
        if self.path is None:
            return
        tensors: dict[str, Tensor] = {}
        for name, result in self.results.items():
            if name not in self.kept or not self.kept[name].get("finished"):
                self.kept[name] = self._rest_of(result)
        for going in goings:
            name = going.result.name
            if self.kept[name].get("finished"):
                continue
            self.kept[name] = self.kept[name] | going.position()
            own = {f"weight/{path}": parameter.detach() for path, parameter in going.named.items()}
            own |= {f"spare/{path}": tensor for path, tensor in going.spare.items()}
            own |= state_tensors(going.optimizer, going.named)
            tensors |= {f"{name}:{key}": tensor.cpu().contiguous() for key, tensor in own.items()}
        content = safetensors.torch.save(tensors)
        where = {"steps": self.steps, "sha256": hashlib.sha256(content).hexdigest(), "trials": self.kept}
        write_files(self.path, {STATE_FILE: content, WHERE_FILE: json.dumps(where).encode()})
        self._write_table()

    def _rest_of(self, result: Result, finished: bool = False) -> dict[str, Any]:
        return {key: getattr(result, key) for key in _KNOWN} | {"records": len(result.records), "finished": finished}

    def leave(self, goings: Sequence[Going], wish: Wish) -> NoReturn:
        """Raise ``Interrupted``, with what is done saved."""
        self.save(goings)
        where = (
            f"saved in {self.path}; go on with --resume (resume=True)"
            if self.path
            else "no folder was named, so it is lost"
        )
        raise Interrupted(f"{wish.name} after step {self.steps} of the sweep: {where}", cast(int, wish.signal))

    def end(self, result: Result, model: nn.Module | None = None) -> None:
        """A trial is at its end: write its adapter, if it has one, and its row."""
        if self.path is None:
            return
        if model is not None and result.trial.lora is not None and not result.ended:
            write_files(self.path / result.name, adapter_files(model, adapters_of(model).active[0]))
        self.kept[result.name] = self._rest_of(result, True)
        self._write_table()

    def finish(self, results: Sequence[Result]) -> None:
        """All trials are at their ends."""
        self.save()

    def _write_table(self) -> None:
        assert self.path is not None
        write_file(self.path / CSV_FILE, as_csv(list(self.results.values())))


def _read(path: Path) -> dict[str, Any]:
    """A file of a sweep that says what it is. Raises ``CheckpointError``."""
    try:
        return parse_json(read_bytes(path, "a sweep"))
    except MiniLoraError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged ({error}); {_ANEW}") from None

"""The folder of a sweep: a table of its trials, a log, an adapter for each, and the state that it goes on from.

    sweep.json         what the sweep is: its trials, data and base; a state of another one is refused
    state.safetensors  weights and optimizer state of the trials that go; state.json: where each trial is, and the digest of the former
    runs.csv           a row a trial: its settings, losses, what was measured
    log.jsonl          a line a step and an evaluation, with the name of the trial
    report.html        figures, table and verdict, and sweep-*.svg where figures were asked for: written by ``lab/verdicts/report.py``
    <trial>/           its adapter, as ``save_adapter`` writes it
    workers.json       while several processes share the trials out: which has which, each in its own worker-N/ (``lab/jobs/workers.py``)

The state is written as one step, so all trials in it are at the same one. Next file: ``lab/sweeps/left.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import safetensors.torch
import torch
from torch import Tensor, nn

from minilora.data.encoding import Encoded
from minilora.data.examples import digests
from minilora.errors import CheckpointError, ConfigError, Interrupted
from minilora.files.parse import parse_tensors
from minilora.files.read import read_bytes
from minilora.files.write import append_line, write_file, write_files
from minilora.lab.sweeps.going import Going
from minilora.lab.sweeps.left import (
    CSV_FILE,
    KNOWN,
    LOG_FILE,
    STATE_FILE,
    SWEEP_FILE,
    WHERE_FILE,
    claim,
    clear,
    read_json,
    read_state,
    refuse_in_the_way,
)
from minilora.lab.sweeps.table import as_csv, described
from minilora.lab.sweeps.trial import Result
from minilora.linear.layers import kind_of
from minilora.lora.slots import adapters_of
from minilora.store.adapter_files import WEIGHTS_FILE
from minilora.store.fingerprint import fingerprint
from minilora.store.save import adapter_files
from minilora.training.lock import held
from minilora.training.optim_state import form_of, put_state, state_form, state_tensors
from minilora.training.signals import Wish

__all__ = ["SweepFolder"]

_SETTINGS = "forget or measured_on, tokens_at_once, start_examples, together"  # as a user knows them


class SweepFolder:
    """What of a sweep lies on disk; with ``path`` None, nothing does.

    Args:
        results: by name of the trial, filled while the sweep goes. data: examples and evaluation. every: steps between states.
        settings: of the whole sweep, which change its numbers.
    """

    def __init__(
        self,
        path: str | Path | None,
        results: Mapping[str, Result],
        data: Sequence[Sequence[Encoded]],
        model: nn.Module,
        every: int,
        settings: Mapping[str, Any],
        watch: Callable[[str, dict[str, Any]], None] | None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.results, self.every, self.watch = results, every, watch
        self.steps = 0
        self.said: set[str] = set()
        self.over: set[str] = set()  # trials whose end was told
        self.told: dict[str, int] = {}  # records of a trial that are in the log
        self.kept: dict[str, Any] = {}  # where each trial was in the state that is gone on from
        self.tensors: dict[str, Tensor] = {}
        if self.path is not None:
            trials = {name: described(result.trial) for name, result in results.items()}
            hashes = [hashlib.sha256(b"".join(digests(examples))).hexdigest() for examples in data]
            linears = [path for path, module in model.named_modules() if kind_of(module) == "linear"]
            base = fingerprint(model, linears, brought={})  # with a print of every tensor
            self.meaning = json.loads(
                json.dumps({"trials": trials, "data": hashes, "base": base, "settings": dict(settings)})
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
        claim(self.path, resume, overwrite)
        refuse_in_the_way(self.path, list(self.results))
        with held(self.path, say):
            if resume and (self.path / WHERE_FILE).exists():
                self._take_up(self.path)
                say(f"going on after step {self.steps}: {self.path}")
            else:
                clear(self.path)
            write_file(self.path / SWEEP_FILE, json.dumps(self.meaning, indent=1))
            lines = [{"run": name} | record for name, result in self.results.items() for record in result.records]
            write_file(self.path / LOG_FILE, "".join(f"{json.dumps(line)}\n" for line in lines))
            self.told = {name: len(result.records) for name, result in self.results.items()}
            yield

    def _take_up(self, path: Path) -> None:
        then = read_json(path / SWEEP_FILE)
        words_of = {"trials": "trials", "data": "data", "base": "base model", "settings": f"settings ({_SETTINGS})"}
        for part, words in words_of.items():
            if then.get(part) != self.meaning[part]:
                raise CheckpointError(
                    f"{path}: a sweep of other {words} lies there; set them back, or begin anew with --overwrite (overwrite=True)"
                )
        where, self.tensors = read_state(path, self.results)
        self.steps, self.kept = where["steps"], where["trials"]
        for name, result in self.results.items():
            if self.watch:
                self.watch(name, {"step": _step_of(result), "before": True})
            if self.kept.get(name, {}).get("finished"):
                self._tell_over(result)

    def finished(self, result: Result) -> bool:
        """Whether the state that is gone on from has its end; its weights are read then, where it left some."""
        if not self.kept.get(result.name, {}).get("finished"):
            return False
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
            if not going.ready:
                self._tell_over(result)

    def _tell_over(self, result: Result) -> None:
        if self.watch and result.name not in self.over:
            self.over.add(result.name)
            self.watch(result.name, {"step": _step_of(result), "ended": result.ended})

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
        return {key: getattr(result, key) for key in KNOWN} | {"records": len(result.records), "finished": finished}

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
        self._tell_over(result)
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


def _step_of(result: Result) -> int:
    return max((record["step"] for record in result.records), default=0)

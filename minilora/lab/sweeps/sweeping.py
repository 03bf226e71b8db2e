"""Many fine-tunings of one model at the same time.

    results = sweep(model, examples, trials_of("lr=3e-4,1e-3,3e-3 r=4,16", seeds=3), evaluation=held_out)

The base is held once. Trials whose adapters are updates of linear layers go through it together, as rows of one batch
(``lab/sweeps/together.py``); the others go one after another, each on a copy of the model. A trial that diverges ends by itself, and
costs the others nothing. Next file: ``lab/sweeps/folder.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.data.encoding import Encoded
from minilora.errors import ConfigError, Interrupted, MiniLoraError, StateError, WriteError
from minilora.job.start import begin_new
from minilora.lab.sweeps.calls import Caller, Ones, assess, step
from minilora.lab.sweeps.folder import SweepFolder
from minilora.lab.sweeps.going import Going
from minilora.lab.sweeps.together import staged, why_not_staged
from minilora.lab.sweeps.trial import Result, Trial
from minilora.linear.layers import is_quantized
from minilora.lora.inject import build_new, checked, place
from minilora.lora.slot import own_parameters
from minilora.lora.slots import adapters_in, adapters_of, has_adapters
from minilora.many.adapted import set_adapter, unload
from minilora.qlora.kbit import checkpoint_activations
from minilora.store.save import adapter_state_dict
from minilora.training.guards import check_examples
from minilora.training.head import why_all_logits
from minilora.training.optim_choice import freeze_beside, optimizer_of
from minilora.training.packed import choose_collate
from minilora.training.probe import refuse_reading_ahead
from minilora.training.signals import Wish, caught

__all__ = ["names_of", "sweep"]

# How settings of heads begin that stand in other classes of a model; where one is there, its module is found.
_OF_HEADS = ("summary", "classifier")
Measure = Callable[[nn.Module, Result], Mapping[str, float]]


def sweep(
    model: nn.Module,
    examples: Sequence[Encoded],
    trials: Sequence[Trial],
    *,
    evaluation: Sequence[Encoded] = (),
    pad_id: int = 0,
    folder: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    save_every: int = 0,
    together: bool = True,
    tokens_at_once: int = 0,
    start_examples: int = 64,
    measure: Measure | None = None,
    measured_on: str = "",
    all_refused: bool = False,
    say: Callable[[str], None] = print,
    watch: Callable[[str, dict[str, Any]], None] | None = None,
) -> list[Result]:
    """Train every trial, each to the adapter that it would have by itself (``lab/sweeps/trial.py``).

    Args:
        model: without adapters, and so again at the end. examples, evaluation: encoded. pad_id: padding token.
        folder: for ``runs.csv``, ``log.jsonl``, an adapter for each trial, and the state to go on from; None keeps all in memory.
        resume: go on from the state in the folder, to the same bits. overwrite: remove the sweep that lies there.
        save_every: steps between states; 0 is at the end and at Ctrl-C.
        together: False runs the trials one after another. tokens_at_once: most tokens of a call, unless one trial has more; 0 is 512 on a
            CPU, 16,384 on a GPU.
        start_examples: that EVA, CorDA and LoRA-GA look at. measure: called with the model, a trial's adapter active, and its result.
        measured_on: what ``measure`` looks at, as a name or a digest: a sweep is gone on with beside the same alone.
        all_refused: what to do if no trial can begin: False raises the first one's reason, True returns results that all ended by one.
        watch: called with a trial's name and every record of it; with ``{"step", "before": True}`` for what an earlier attempt did of it,
            and with ``{"step", "ended": why}`` where it ends, ``why`` being "" for one that came to its end.

    Returns:
        A result for each trial, in their order.

    Raises:
        ConfigError: two trials of one name, or none. StateError: the model has adapters. DataError: as ``training.train``.
        CheckpointError: a sweep lies in the folder, or the state there is another sweep's. Interrupted: by a signal; what is done is saved.
    """
    named = {name: Result(trial, name) for name, trial in zip(names_of(trials), trials, strict=True)}
    if has_adapters(model):
        raise StateError(
            "the model has adapters already; wanted a bare one, from which every trial begins; unload(model) first"
        )
    check_examples(model, examples, pad_id)
    if evaluation:
        check_examples(model, evaluation, pad_id, "evaluation")
    refuse_reading_ahead(model, examples, pad_id)
    room = tokens_at_once or (16384 if next(model.parameters()).is_cuda else 512)
    settings = {"room": room, "start_examples": start_examples, "together": together, "measured on": measured_on}
    here = SweepFolder(folder, named, (examples, evaluation), model, save_every, settings, watch)
    going = _Sweep(model, examples, evaluation, pad_id, room, start_examples, measure, say, here, list(named.values()))
    with here.held(resume, overwrite, say), _as_it_was(model), caught() as wish:
        going.run(wish, together, all_refused)
    return going.results


def names_of(trials: Sequence[Trial]) -> list[str]:
    """A name for each trial: its own, or its number. Raises ``ConfigError`` for none at all, and for two of one name."""
    if not trials:
        raise ConfigError("no trial; give one at least")
    names = [trial.name or f"t{number:0{len(str(len(trials)))}d}" for number, trial in enumerate(trials, 1)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two trials are called {twice[0]!r}; give each a name of its own, or none a name")
    return names


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """The model is bare at the end, trains what it trained and keeps what it kept; torch's random state is what it was."""
    trained, mode = [(p, p.requires_grad) for p in model.parameters()], model.training
    again: list[tuple[Any, Any]] = [
        (module, module.gradient_checkpointing)
        for module in model.modules()
        if hasattr(module, "gradient_checkpointing")
    ]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            if has_adapters(model):
                unload(model)
            for parameter, wanted in trained:
                parameter.requires_grad_(wanted)
            for module, computed_again in again:
                module.gradient_checkpointing = computed_again
            model.train(mode)


@dataclass
class _Sweep:
    """A sweep while it goes. ``held``: what goes together, by name; the others follow."""

    model: nn.Module
    examples: Sequence[Encoded]
    evaluation: Sequence[Encoded]
    pad_id: int
    room: int
    start_examples: int
    measure: Measure | None
    say: Callable[[str], None]
    here: SweepFolder
    results: list[Result]
    held: list[Going] = field(default_factory=list)

    def run(self, wish: Wish, together: bool, all_refused: bool) -> None:
        """All of it."""
        refused = []
        why = self._why_none_together() if together else "as asked for"
        for result in self.results:
            if self.here.finished(result):
                continue
            result.alone = why or result.trial.why_alone
            if not result.alone:
                self._try(result, self._place)
                refused += [result] * bool(result.ended)
        if len(refused) == len(self.results) and not all_refused:
            raise ConfigError(self.results[0].ended)
        with_reason = [r for r in self.results if r.alone and not r.ended and not self.here.finished(r)]
        for reason in dict.fromkeys(result.alone for result in with_reason):
            count = sum(result.alone == reason for result in with_reason)
            self.say(f"{count} of {len(self.results)} trials run one after another: {reason}")
        if self.held:
            self._together(wish)
        for result in with_reason:
            self._try(result, self._alone, wish)
        self.here.finish(self.results)

    def _try(self, result: Result, work: Callable[..., None], *rest: Any) -> None:
        """Do it for one trial; what is refused ends that trial alone."""
        try:
            work(result, *rest)
        except (Interrupted, WriteError):  # a full disk is nothing of this trial's
            raise
        except MiniLoraError as error:
            result.ended = str(error)
            self.say(f"{result.name}: {error}")
            self.here.end(result)

    def _why_none_together(self) -> str:
        """Why the model lets no trials share a pass, in words; "" if it does."""
        config = getattr(self.model, "config", None)
        for name, value in _settings(getattr(config, "to_dict", dict)()):
            if "drop" in str(name) and not str(name).startswith(_OF_HEADS) and isinstance(value, float) and value > 0:
                return f"the model itself drops while it trains ({name}={value})"
        module = next((n for n, m in self.model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0), None)
        return f"the model itself drops while it trains ({module})" if module else ""

    def _place(self, result: Result) -> None:
        """Put a trial's adapter beside the model; what cannot be staged is left for later."""
        trial, model = result.trial, self.model
        assert trial.lora is not None
        torch.manual_seed(trial.train.seed)
        config = checked(trial.lora, trial.variant)
        values = build_new(model, config, result.name, trial.variant)
        result.alone = why_not_staged(values, model)
        if result.alone:
            return
        place(model, config, result.name, values, trial.variant, activate=False, trainable=True)
        freeze_beside([value for value in values.values() if isinstance(value, nn.Module)], trial.train)
        own = {path: value for path, value in values.items() if isinstance(value, nn.Module)}
        named = {f"{path}.{name}": p for path, value in own.items() for name, p in _trained(value)}
        self.held.append(self._going(result, model, named, list(own.values())))

    def _going(
        self, result: Result, model: nn.Module, named: dict[str, nn.Parameter], own: Sequence[nn.Module]
    ) -> Going:
        config = result.trial.train.for_examples(len(self.examples))
        result.trial = Trial(result.trial.lora, config, result.trial.variant, result.trial.name)
        result.parameters = sum(parameter.numel() for parameter in named.values())
        tensors = choose_collate(model, self.examples, config, self.pad_id, self.here.once(self.say))
        return Going(result, named, own, optimizer_of(model, named, config), self.examples, tensors)

    def _together(self, wish: Wish) -> None:
        again = any(going.config.gradient_checkpointing for going in self.held)
        if again:
            checkpoint_activations(self.model)
        why_all_logits(self.model)  # asked of the plain model, and remembered
        self.here.put(self.held)
        with staged(self.model, again) as stage:
            self._go(stage, self.held, wish)
        with self._finishing(self.held) as finish:
            for going in self.held:
                set_adapter(self.model, going.result.name)
                finish(going, self.model)
        unload(self.model)
        self.here.save()

    def _alone(self, result: Result, wish: Wish) -> None:
        """A trial on a copy of the model."""
        model, trial = copy.deepcopy(self.model), result.trial
        if trial.lora is None:
            named = _all_of(model)
        else:
            begin_new(model, trial.lora, trial.train, trial.variant, self.examples, self.pad_id, self.start_examples)
            freeze_beside(adapters_in(model), trial.train)
            named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        going = self._going(result, model, named, [model])
        if trial.train.gradient_checkpointing:
            checkpoint_activations(model)
        self.here.put([going])
        self._go(Ones(model), [going], wish)
        with self._finishing([going]) as finish:
            finish(going, model)
        self.here.save()

    def _go(self, caller: Caller, all_of: Sequence[Going], wish: Wish) -> None:
        """Step by step, each step of every trial that has one to do."""
        rest = (self.pad_id, self.room)
        while True:
            due = [going for going in all_of if going.due]
            if due and self.evaluation:
                caller.model.eval()
                assess(caller, due, self.evaluation, *rest)
                self.here.log(due)
            ready = [going for going in all_of if going.ready]
            if not ready:
                return
            if wish.signal is not None:
                self.here.leave(all_of, wish)
            caller.model.train()
            step(caller, ready, *rest)
            for going in ready:
                if going.result.ended:
                    self.say(f"{going.result.name} ends: {going.result.ended}")
            self.here.log(ready)
            self.here.after_step(all_of)

    @contextmanager
    def _finishing(self, goings: Sequence[Going]) -> Iterator[Callable[[Going, nn.Module], None]]:
        """``_finish``; where the disk refuses one trial's files, the others are written first, and what is trained is kept as a state."""
        refused: list[WriteError] = []

        def finish(going: Going, model: nn.Module) -> None:
            try:
                self._finish(going, model)
            except WriteError as error:
                refused.append(error)

        yield finish
        if refused:
            with suppress(WriteError):
                self.here.save(goings)
            raise refused[0]

    def _finish(self, going: Going, model: nn.Module) -> None:
        going.finish()
        model.eval()
        result = going.result
        named = going.named if result.trial.lora is None else adapter_state_dict(model, _active(model))
        result.weights = {name: value.detach().cpu().clone() for name, value in named.items()}
        if self.measure and not result.ended:
            result.measured = dict(self.measure(model, result))
        self.here.end(result, model)


def _settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings of a model, those of its parts (a text model beside a picture's) among them."""
    for name, value in config.items():
        yield from _settings(value) if isinstance(value, Mapping) else [(name, value)]


def _trained(value: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    own = {id(parameter) for parameter in own_parameters(value)}
    return ((name, p) for name, p in value.named_parameters() if id(p) in own and p.requires_grad)


def _active(model: nn.Module) -> str:
    return adapters_of(model).active[0]


def _all_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every weight, to be trained. Raises ``StateError`` for a packed model."""
    if packed := next((path for path, module in model.named_modules() if is_quantized(module)), None):
        raise StateError(
            f"{packed} is packed, and full fine-tuning changes every weight; load the dense model (--quant none)"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

"""What claims stand on: a small model, a text to learn and one to forget, and runs of them that are tuned, and done once.

    ground = Ground()
    tuned = ground.tune({"r=4": {"r": 4}, "r=16": {"r": 16}}, rates=RATES)
    tuned["r=4"].rate, tuned["r=4"].losses        # the best rate, and the held-out loss there by seed

Each trial is done once in a process: claims that ask for the same one share it. Next file: ``lab/ground/by_hand.py``.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minilora.data.encoding import Encoded
from minilora.errors import ConfigError, MissingPackageError
from minilora.hf.load import load_model, load_tokenizer
from minilora.lab.byte_model import byte_model, code, docs, text_examples
from minilora.lab.ground.claim import Curve, Picture
from minilora.lab.measures.divergence import divergence
from minilora.lab.sweeps.sweeping import sweep
from minilora.lab.sweeps.table import described
from minilora.lab.sweeps.trial import Result, Trial
from minilora.lab.verdicts.interval import Interval, interval
from minilora.lora.config import LoraConfig
from minilora.qlora.quantize_model import quantize_model
from minilora.quant.config import QuantConfig
from minilora.training.settings import TrainConfig

__all__ = ["LADDER", "RATES", "SEEDS", "Ground", "Tuned", "kl", "log_probabilities", "loss_picture"]

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LADDER = tuple(
    float(f"{lead}e{power}") for power in range(-6, 0) for lead in (1, 3)
)  # all rates that a grid moves over
SEEDS = (0, 1, 2)
LENGTH, BATCH, STEPS = 128, 8, 60
ALPHA = 32  # of every adapter, if nothing else is said


@dataclass(frozen=True)
class Tuned:
    """A family of trials that differ in rate and seed.

    Attributes:
        results: by rate and seed.
    """

    name: str
    results: Mapping[float, Mapping[int, Result]]

    def losses_at(self, rate: float) -> dict[int, float]:
        """The held-out loss by seed, nats a byte; infinite for a trial that diverged."""
        return {seed: _loss(result) for seed, result in self.results[rate].items()}

    @property
    def rate(self) -> float:
        """The rate of the lowest mean loss, over the seeds that every rate was tried with."""
        seeds = set.intersection(*(set(by_seed) for by_seed in self.results.values()))
        return min(self.results, key=lambda rate: math.fsum(self.losses_at(rate)[seed] for seed in seeds))

    @property
    def outwards(self) -> int:
        """-1 or 1 where the best rate is the lowest or the highest that was tried, so that a better one may lie beyond; 0 inside.

        0 too where no trial began, which no rate helps.
        """
        if math.isnan(self.before):
            return 0
        return (self.rate == max(self.results)) - (self.rate == min(self.results))

    @property
    def before(self) -> float:
        """The held-out loss before the first step; NaN where no trial began."""
        found = [result.evaluations.get(0) for by_seed in self.results.values() for result in by_seed.values()]
        return next((loss for loss in found if loss is not None), math.nan)

    @property
    def losses(self) -> dict[int, float]:
        """The held-out loss at the best rate, by seed."""
        return self.losses_at(self.rate)

    @property
    def at_first(self) -> dict[int, float]:
        """The held-out loss before the first step, by seed."""
        return {seed: result.evaluations[0] or math.inf for seed, result in self.results[self.rate].items()}

    def measured(self, name: str, rate: float | None = None) -> dict[int, float]:
        """What was measured at a rate (default the best), by seed."""
        return {
            seed: result.measured[name] for seed, result in self.results[rate or self.rate].items() if not result.ended
        }

    def curve(self) -> list[tuple[float, float, float, float]]:
        """``(rate, mean, low, high)`` of every rate at which no seed diverged; the ends are the least and the largest seed."""
        points = []
        for rate in sorted(self.results):
            values = list(self.losses_at(rate).values())
            if all(map(math.isfinite, values)):
                points.append((rate, math.fsum(values) / len(values), min(values), max(values)))
        return points

    @property
    def log_rate(self) -> Interval:
        """The natural logarithm of the best rate of each seed, as an interval; the grid makes it coarse."""
        seeds = set.intersection(*(set(by_seed) for by_seed in self.results.values()))
        return interval([math.log(min(self.results, key=lambda rate: self.losses_at(rate)[seed])) for seed in seeds])


def loss_picture(tuned: Iterable[Tuned]) -> Picture:
    """The loss of each family over the learning rate; rates that are worse than no training leave the picture."""
    families = list(tuned)
    before = [family.before for family in families if math.isfinite(family.before)]
    curves = [Curve(family.name, family.curve()) for family in families]
    return Picture("learning rate", "held-out loss (nats a byte)", curves, log_x=True, before=max(before, default=None))


class Ground:
    """The model, the texts, and the trials that were done.

    Args:
        steps: of every trial. say: gets a line for every set of trials that is begun. watch: called after every step of such a set with
            the steps that are done, and all that are to be done.
    """

    def __init__(
        self, steps: int = STEPS, say: Callable[[str], None] = print, watch: Callable[[int, int], None] | None = None
    ) -> None:
        self.steps, self.say, self.watch = steps, say, watch
        self.done: dict[str, Result] = {}

    @functools.cached_property
    def model(self) -> Any:
        """The byte model, frozen, in fp32."""
        return byte_model()

    @functools.cached_property
    def lesson(self) -> list[Encoded]:
        """What is learnt: Python's source, which the model has not read."""
        return text_examples(code(), LENGTH)[:4096]

    @functools.cached_property
    def held_out(self) -> list[Encoded]:
        """Source of other modules, on which learning is judged."""
        return _spread(text_examples(code(held_out=True), LENGTH), 32)

    @functools.cached_property
    def prose(self) -> list[Encoded]:
        """Held-out text of the kind that the model was trained on: what it may forget."""
        return _spread(text_examples(docs(held_out=True), LENGTH), 32)

    def on(self, quant: QuantConfig | None, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Options for ``results`` and ``tune``: a copy of the model in ``dtype``, its linear layers packed if ``quant`` is given."""
        model = copy.deepcopy(self.model)
        for parameter in model.parameters():  # model.to would round the angles of the rotary embedding, too
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        return {"model": quantize_model(model, quant) if quant else model, "key": f"{quant or 'dense'} {dtype}"}

    def second(self) -> tuple[Any, list[Encoded]] | None:
        """SmolLM2-135M and the held-out prose in its tokens; None where its package is not installed."""
        try:
            model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
        except MissingPackageError:
            return None
        ids = tokenizer(docs(held_out=True).decode(), verbose=False)["input_ids"]
        cuts = [tuple(ids[at : at + LENGTH]) for at in range(0, len(ids) - LENGTH + 1, LENGTH)]
        return model.requires_grad_(False), _spread([Encoded(cut, cut) for cut in cuts], 16)

    def trial(self, rate: float, seed: int, **fields: Any) -> Trial:
        """A trial of ``fields``: of ``LoraConfig``, of ``TrainConfig``, and ``variant`` ("full" for full fine-tuning)."""
        kind = fields.pop("variant", None)
        plan: dict[str, Any] = {
            "steps": self.steps,
            "batch_size": BATCH,
            "schedule": "constant",
            "lr": rate,
            "seed": seed,
        }
        plan |= {name: fields.pop(name) for name in list(fields) if name in TrainConfig.__dataclass_fields__}
        lora: dict[str, Any] = {"r": 8, "lora_alpha": ALPHA, "target_modules": "all-linear"} | fields
        return Trial(
            None if kind == "full" else LoraConfig(**lora), TrainConfig(**plan), None if kind == "full" else kind
        )

    def results(
        self, trials: Sequence[Trial], model: Any = None, lesson: Sequence[Encoded] | None = None, key: str = ""
    ) -> list[Result]:
        """What came of trials, those of before included.

        Args:
            model: another than ``self.model``. lesson: other examples to learn from, judged on themselves. key: says which, for the memory.
        """
        keys = [key + repr(described(trial)) for trial in trials]
        new = {name: trial for name, trial in zip(keys, trials, strict=True) if name not in self.done}
        if new:
            self.say(f"{len(new)} fine-tunings{f' ({key})' if key else ''}")
            base, judged = model or self.model, self.held_out if lesson is None else lesson
            before = [loss.clone() for loss in log_probabilities(base, self.prose)]

            def measure(adapted: Any, result: Result) -> dict[str, float]:
                return {"forgetting": kl(before, adapted, self.prose)}

            count, total = itertools.count(1), sum(trial.train.steps for trial in new.values())

            def watch(name: str, record: dict[str, Any]) -> None:
                if self.watch is not None and "eval_loss" not in record:
                    self.watch(next(count), total)

            options: dict[str, Any] = {
                "evaluation": judged,
                "measure": measure,
                "say": lambda line: None,
                "watch": watch,
            }
            found = sweep(base, self.lesson if lesson is None else lesson, list(new.values()), **options)
            self.done |= dict(zip(new, found, strict=True))
        return [self.done[name] for name in keys]

    def tune(
        self,
        families: Mapping[str, Mapping[str, Any]],
        rates: Sequence[float] = RATES,
        seeds: Sequence[int] = SEEDS,
        **options: Any,
    ) -> dict[str, Tuned]:
        """Every family at every rate, for every seed; ``options`` as ``results``."""
        return self._tuned(
            families, [(name, rate, seed) for name in families for rate in rates for seed in seeds], options
        )

    def tune_alike(
        self,
        families: Mapping[str, Mapping[str, Any]],
        count: int = len(RATES),
        seeds: Sequence[int] = SEEDS,
        **options: Any,
    ) -> dict[str, Tuned]:
        """Every family with the same number of rates, whose grid is moved, not grown, until the best rate lies inside.

        The first seed chooses the rate; the others run there alone, so that many families can be afforded.

        Args:
            count: of the rates, at least 3. options: as ``results``.

        Raises:
            ConfigError: a count of which none lies inside, or more than LADDER has.
        """
        if not 3 <= count <= len(LADDER):
            raise ConfigError(f"{count} rates: wanted 3 to {len(LADDER)}, so that the best can have one on each side")
        first = dict.fromkeys(families, LADDER.index(3e-3) - count // 2)
        moving, tuned = list(families), dict[str, Tuned]()
        while moving:
            asked = [(name, rate, seeds[0]) for name in moving for rate in LADDER[first[name] :][:count]]
            tuned |= self._tuned(families, asked, options)
            wanted = {name: first[name] + tuned[name].outwards for name in moving}
            moving = [
                name for name in moving if wanted[name] != first[name] and 0 <= wanted[name] <= len(LADDER) - count
            ]
            first |= {name: wanted[name] for name in moving}
        asked = [(name, rate, seeds[0]) for name in families for rate in tuned[name].results]
        asked += [(name, tuned[name].rate, seed) for name in families for seed in seeds[1:]]
        return self._tuned(families, asked, options)

    def _tuned(
        self,
        families: Mapping[str, Mapping[str, Any]],
        asked: Iterable[tuple[str, float, int]],
        options: Mapping[str, Any],
    ) -> dict[str, Tuned]:
        """The families of which trials are asked for, as ``(name, rate, seed)``."""
        trials = {(name, rate, seed): self.trial(rate, seed, **families[name]) for name, rate, seed in asked}
        by_name: dict[str, dict[float, dict[int, Result]]] = {}
        for (name, rate, seed), result in zip(trials, self.results(list(trials.values()), **options), strict=True):
            by_name.setdefault(name, {}).setdefault(rate, {})[seed] = result
        return {name: Tuned(name, by_rate) for name, by_rate in by_name.items()}


def _loss(result: Result) -> float:
    return math.inf if result.eval_loss is None else result.eval_loss


def _spread(examples: list[Encoded], count: int) -> list[Encoded]:
    """So many of them, evenly from all."""
    return [examples[at * len(examples) // count] for at in range(count)]


@torch.no_grad()
def log_probabilities(model: Any, examples: Sequence[Encoded]) -> list[torch.Tensor]:
    """The model's log-probabilities after every token, ``[tokens, vocabulary]`` for each batch."""
    ids = torch.tensor([example.input_ids for example in examples], device=model.device)
    return [
        model(batch, use_cache=False).logits[:, :-1].float().log_softmax(-1).flatten(0, 1) for batch in ids.split(16)
    ]


def kl(before: Sequence[torch.Tensor], model: Any, examples: Sequence[Encoded]) -> float:
    """KL(base || model) in nats a token, the base's log-probabilities given; as ``measures.forgetting``, of a model by itself."""
    total = count = 0.0
    for was, now in zip(before, log_probabilities(model, examples), strict=True):
        total += float(divergence(was, now).sum(dtype=torch.float64))
        count += len(was)
    return total / count

"""The training loop: an optimizer on the adapter, warm-up and decay of its rate, accumulation, clipping, evaluation, saves.

    for step in range(config.steps):
        batches = ...                                           the next micro-batches, ``data/batches.py``
        loss, norm = gradients(model, parameters, batches)      ``training/step.py``
        descend(optimizer, parameters, norm, config.clip, learning_rate(config, step))
        # and now and then: evaluate, save

These lines are ``go`` and ``advance`` below; all else is what a run needs that may be ended, gone on with, or shared by processes.
Everything that happens is a line in ``log.jsonl``. What ends a run early leaves its last good state in a checkpoint: a signal, too many
steps without a finite gradient, no memory for a step. Next file: ``report/page.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minilora.data.batches import Collate, collate, micro_batches
from minilora.data.encoding import Encoded
from minilora.errors import MiniLoraError, StateError, TrainingError
from minilora.lora.bare import Around
from minilora.lora.slots import adapters_of
from minilora.qlora.kbit import checkpoint_activations
from minilora.store.save import file_base
from minilora.training.best import Best, refuse_without_evaluations
from minilora.training.check import refuse_dead
from minilora.training.compiling import as_written, compiled, refuse_without_compiler
from minilora.training.endings import leave, skip, stop_without_memory
from minilora.training.flops import flops_a_token, peak_flops
from minilora.training.guards import check_examples, check_parameters
from minilora.training.head import NO_HEAD, why_all_logits
from minilora.training.left import claim
from minilora.training.lifeline import Elsewhere
from minilora.training.lock import held
from minilora.training.losses import evaluate, token_losses
from minilora.training.meaning import meaning
from minilora.training.memory import is_out_of_memory, memory_mb
from minilora.training.offload import refuse_offload
from minilora.training.optim_choice import as_trained, optimizer_of
from minilora.training.packed import choose_collate
from minilora.training.probe import refuse_reading_ahead
from minilora.training.processes import Processes, joined
from minilora.training.profile import Profile
from minilora.training.progress import busy
from minilora.training.run_folder import RunFolder
from minilora.training.schedule import learning_rate, step_seed
from minilora.training.settings import SCHEDULE, TrainConfig
from minilora.training.sharding import in_turn, shard_blocks
from minilora.training.signals import Wish, caught
from minilora.training.step import descend, gradients, why_not_begun
from minilora.training.together import make_room, order_of_sums, refuse_different

__all__ = ["TrainConfig", "train"]


def train(
    model: nn.Module,
    examples: Sequence[Encoded],
    config: TrainConfig,
    folder: Path,
    pad_id: int,
    evaluation: Sequence[Encoded] = (),
    sample: Callable[[], tuple[str, str]] | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
    notes: Mapping[str, str] | None = None,
    shard: bool = False,
    origin: str = "",
    ready: Callable[[RunFolder], None] | None = None,
) -> list[dict[str, Any]]:
    """Train the active adapter in place; the finished one lies in ``folder``.

    Ctrl-C and SIGTERM end the run after its step, which is saved; a second one ends it at once. Under torchrun the micro-batches of a step
    are shared out among the processes; the first one alone writes and speaks, and the adapter is the same whatever their number.

    Args:
        model: with adapters. examples, evaluation: encoded data. pad_id: padding token.
        folder: for ``log.jsonl``, the adapter at the end, and ``checkpoint-<step>/`` every ``save_every`` steps.
        sample: returns (prompt, answer), asked at every evaluation. watch: called with every record that is logged.
        resume: go on from the newest checkpoint that verifies, to the same bits (from the start if there is none yet).
        overwrite: remove the run that lies in the folder first. say: gets a line for what is skipped, and for where a run goes on.
        notes: as ``meaning.meaning``: what may be why the examples are others when the run is gone on with.
        shard: each process keeps its part of the frozen weights of the model's blocks alone (``sharding.py``).
        origin: the digest of the saved adapter that this one was before the run (``store.adapter_files.adapter_sha256``), "" for none.
        ready: called by the first process when all is ready for the first step, with the folder and how far the run is.

    Returns:
        The records of the whole run. Per step: ``step, loss, lr, grad_norm, tokens, tokens_per_s, rss_mb, seconds`` (and
        ``share_of_peak`` on a GPU whose peak is known, ``flops.py``), or ``step, skipped, seconds`` for one without a finite loss and
        gradient; per evaluation: ``step, eval_loss`` and the sample.

    Raises:
        StateError: something would not train, or not be saved, by name; the model reads ahead; or the first gradient is zero or not finite.
        ConfigError: the processes differ in what they train, or are more than the micro-batches of a step.
        DataError: an example that cannot be used, by its place. CheckpointError: a run lies in the folder or goes on in it, or the
        checkpoint is another run's. Nothing is left then.
        TrainingError: ``max_skipped`` steps in a row were skipped. OutOfMemory: a step does not fit. Interrupted: by a signal. The last
        good state is saved then.
    """
    with joined() as processes, ExitStack() as until_the_end:
        if processes.first:
            claim(Path(folder), resume, overwrite)
        named = check_parameters(model)
        until_the_end.enter_context(as_trained(model, config))
        named = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        check_examples(model, examples, pad_id)
        config = config.for_examples(len(examples))
        if evaluation:
            check_examples(model, evaluation, pad_id, "evaluation")
        refuse_without_evaluations(config, evaluation)
        refuse_reading_ahead(model, examples, pad_id)
        if config.offload != "none":
            refuse_offload(next(model.parameters()).device)
        if config.compile:
            refuse_without_compiler(model)
        told = say if processes.first else _silent
        tensors = choose_collate(model, examples, config, pad_id, told)
        if (why := why_all_logits(model)) not in (None, NO_HEAD):
            told(f"the loss computes all logits of a micro-batch: {why}")
        rest = (pad_id, tensors, evaluation, sample, watch, told, notes or {}, processes, shard, origin)
        run = _Run(model, named, examples, config, Path(folder), *rest)
        with held(run.here.path, say) if processes.first else nullcontext():
            make_room(processes, run.here.path, resume, overwrite)
            run.start(resume)
            if ready and processes.first:
                ready(run.here)
            with caught(patient=processes.launched) as wish, run.profile, compiled(model, config.compile):
                try:
                    run.go(wish)
                except Elsewhere:  # the last good state is here too, and nobody else may be able to save it
                    with suppress(MiniLoraError):
                        run.here.save()
                    raise
            run.here.finish()
        return run.here.records


def _silent(line: str) -> None:
    """What all but the first process say."""


@dataclass
class _Run:
    """One run from its first step to its last: what ``train`` was given, and where it is.

    Attributes:
        named: the parameters that train. tensors: makes batches, packed or padded. here: its folder, and how far it is.
    """

    model: nn.Module
    named: dict[str, nn.Parameter]
    examples: Sequence[Encoded]
    config: TrainConfig
    folder: Path
    pad_id: int
    tensors: Collate
    evaluation: Sequence[Encoded]
    sample: Callable[[], tuple[str, str]] | None
    watch: Callable[[dict[str, Any]], None] | None
    say: Callable[[str], None]
    notes: Mapping[str, str]
    processes: Processes
    shard: bool
    origin: str

    def __post_init__(self) -> None:
        config, processes = self.config, self.processes
        self.shard = self.shard and processes.size > 1  # one process has all of it
        adapter = adapters_of(self.model).active[0]
        self.parameters = list(self.named.values())
        self.optimizer = optimizer_of(self.model, self.named, config)
        self.peak, self.flops = peak_flops(next(self.model.parameters()).device), flops_a_token(self.model)
        with processes.exchange(), in_turn(self.model) as around:  # of a model that came in shards
            means = self.means(adapter, around)
            base = file_base(self.model, adapter, around) if self.shard else None
        command = repr((config, self.pad_id, self.shard, self.sample is None))
        refuse_different(processes, means, command, self.model, adapter)
        whose = (self.model, adapter, self.named, self.optimizer, means, config.keep_checkpoints)
        self.best = Best(config)
        self.here = RunFolder(self.folder, *whose, self.best, processes, self.say, self.watch, base)
        if not processes.is_exact(config.accumulate):
            self.say(
                f"{config.accumulate} micro-batches over {processes.size} processes have no fixed order: the last bits depend on the "
                "number of processes (a power of two that divides accumulate has one)"
            )

    def means(self, adapter: str, around: Around) -> dict[str, Any]:
        """As ``meaning.meaning``."""
        config = self.config
        schedule = {name: getattr(config, name) for name in SCHEDULE}
        if self.origin:
            schedule["init_from"] = self.origin
        if config.patience or config.keep_best:
            schedule["eval_every"] = config.eval_every
        schedule["examples a step"] = config.batch_size * config.accumulate
        data = {"training data": self.examples, "evaluation data": self.evaluation}
        bits: dict[str, Any] = {
            name: getattr(config, name) for name in ("batch_size", "gradient_checkpointing", "compile")
        }
        bits["packed"] = self.tensors is not collate
        bits["attention"] = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        bits["order of sums"] = order_of_sums(self.processes, config.accumulate)
        return meaning(self.model, adapter, schedule, data, bits, self.notes, around)

    def start(self, resume: bool) -> None:
        """From the newest checkpoint, or from nothing."""
        config, here = self.config, self.here
        going = here.go_on() if resume else None
        if config.gradient_checkpointing:  # not before the checkpoint is accepted: until then nothing changes
            checkpoint_activations(self.model)
        if self.shard:
            shard_blocks(self.model, self.processes)
        self.schedule = replace(config, steps=config.steps - here.schedule_begin)
        if going:
            self.say(going)
        if here.step and here.schedule_begin == here.step:
            self.say(
                f"a new schedule from step {here.step}: the learning rate of steps {here.step + 1} to {config.steps} rises and falls as in "
                f"a run of {self.schedule.steps} steps"
            )
        here.open_log()
        self.profile = Profile(here.path, config.profile if self.processes.first else 0, config.steps - here.step)
        self.batches = micro_batches(self.examples, config.batch_size, config.seed, here.step * config.accumulate)

    def go(self, wish: Wish) -> None:
        """Step by step to the end, or until a signal."""
        config, here = self.config, self.here
        self.model.train()
        if self.due() and not self.assessed():
            self.in_memory(self.assess)  # of the start; or the run was ended in the middle of this evaluation
        self.processes.prepare(lambda: wish.signal is not None, here.save)
        while here.step < config.steps and not self.best.over:
            wish.signal = next(filter(None, self.processes.share(wish.signal)), None)  # all leave after the same step
            if wish.signal is not None:
                leave(here, wish)
            with self.profile.step(here.step + 1):
                self.in_memory(self.advance)
            if self.due():
                self.in_memory(self.assess)
            if config.save_every and here.step % config.save_every == 0 and here.good == here.step:
                here.refuse_apart()
                here.save()
        if self.best.over and here.step < config.steps:
            self.say(
                f"stopped after step {here.step} of {config.steps}: {config.patience} evaluations without a lower loss"
            )

    def due(self) -> bool:
        """Whether the model is evaluated after the step that it is at: before the first, every ``eval_every``, after the last."""
        step, every = self.here.step, self.config.eval_every
        regular = every > 0 and step % every == 0
        return bool(self.evaluation) and (step in (0, self.config.steps) or regular)

    def assessed(self) -> bool:
        """Whether the evaluation of this step is known: to the checkpoint of a run that asks for it, or to the log."""
        step = self.here.step
        if step and self.best.up_to(step) is not None:
            return any(one.step == step for one in self.best.seen)
        return any("eval_loss" in record for record in self.here.records if record["step"] == step)

    def assess(self) -> None:
        rest = (self.config.batch_size, self.pad_id, self.processes, self.shard, self.tensors)
        with as_written(self.model), busy("evaluating"):
            loss = evaluate(self.model, self.evaluation, *rest)
            asks = self.sample if self.shard or self.processes.first else None  # in shards all must ask
            asked = asks() if asks else None
        record: dict[str, Any] = {"step": self.here.step, "eval_loss": loss if math.isfinite(loss) else None}
        if asked:
            record |= dict(zip(("prompt", "answer"), asked, strict=True))
        self.here.log(record)
        if self.here.good and self.best.note(self.here.step, record["eval_loss"], self.here.good) and self.best.spare:
            self.here.refuse_apart()
            self.here.save()

    def advance(self) -> None:
        """One step: gradients, a look at them, an update. A step that is not finite changes nothing but its place in the schedule."""
        config, here, started = self.config, self.here, time.monotonic()
        rate = learning_rate(self.schedule, here.step - here.schedule_begin)
        batches = list(islice(self.batches, config.accumulate))
        seeds = [step_seed(config.seed, here.step * config.accumulate + number) for number in range(config.accumulate)]
        given = (self.model, self.named, batches, self.pad_id, seeds, self.processes, self.shard, self.tensors)
        loss, norm, problem = gradients(*given, offload=config.offload != "none")
        if not here.good and (problem or norm == 0):
            here.leave_nothing()
            raise StateError(why_not_begun(problem))
        if not here.good:
            self.look_for_dead(batches[0])
        if problem:
            self.optimizer.zero_grad()
            skip(here, config.max_skipped, problem)
            return
        self.update(rate, norm)
        spent, each = time.monotonic() - started, [example for batch in batches for example in batch]
        tokens = sum(len(example.input_ids) for example in each)
        record = {"step": here.step, "loss": loss, "lr": rate, "grad_norm": float(norm), "tokens": tokens}
        record |= {"tokens_per_s": tokens / spent, "rss_mb": memory_mb(), "seconds": here.seconds}
        if self.peak:
            body, head = self.flops
            wanted = body * tokens + head * sum(example.supervised for example in each)
            record["share_of_peak"] = wanted / spent / (self.peak * self.processes.size)
        here.log(record)

    def update(self, rate: float, norm: Tensor) -> None:
        """Change the weights by the gradients, whose norm it is."""
        here = self.here
        here.whole = False  # until the last weight is changed, there is nothing to save
        if not descend(self.optimizer, self.parameters, norm, self.config.clip, rate):
            raise TrainingError(
                f"step {here.step + 1}: a weight of the adapter became infinite at learning rate {rate:g}; {here.save()}; "
                "lower lr, or train it in float32"
            )
        here.step = here.good = here.step + 1
        here.whole = True

    def look_for_dead(self, examples: Sequence[Encoded]) -> None:
        """After the first backward pass: refuse a layer that the loss does not depend on, and say what this step left open."""
        try:
            with as_written(self.model):
                found = refuse_dead(self.model, lambda: token_losses(self.model, self.tensors(examples, self.pad_id)))
        except StateError:
            self.here.leave_nothing()
            raise
        if found.zero or found.unreached:
            self.say(str(found))

    def in_memory(self, work: Callable[[], None]) -> None:
        """Do it; where there is no memory for it, save the last step and say what would fit."""
        failed = None
        try:
            work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = " ".join(str(error).split())[:200]
        if failed is not None:  # outside of the handler, whose traceback holds the step's tensors
            self.optimizer.zero_grad()
            longest = max(len(example.input_ids) for example in self.examples)
            stop_without_memory(self.here, longest, failed)

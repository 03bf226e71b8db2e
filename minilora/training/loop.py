"""The training loop: AdamW on the adapter, linear warm-up and cosine decay, accumulation, clipping, evaluation, saves.

Everything that happens is a line in ``log.jsonl``. What ends a run early leaves its last good state in a checkpoint: a signal, too many
steps without a finite gradient, no memory for a step. Next file: ``report/page.py``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from minilora.data.batches import Collate, collate, micro_batches
from minilora.data.encoding import Encoded
from minilora.errors import Interrupted, MiniLoraError, OutOfMemory, StateError, TrainingError
from minilora.files.write import append_line, remove, write_file, write_files
from minilora.lora.slots import adapters_of
from minilora.qlora.kbit import checkpoint_activations
from minilora.store.save import adapter_files, file_base
from minilora.training.check import refuse_dead
from minilora.training.checkpoint import prune, save_checkpoint
from minilora.training.guards import check_examples, check_parameters
from minilora.training.head import NO_HEAD, why_all_logits
from minilora.training.lifeline import Elsewhere
from minilora.training.lock import held
from minilora.training.losses import evaluate, token_losses
from minilora.training.memory import is_out_of_memory, memory_mb
from minilora.training.optim import make_optimizer
from minilora.training.packed import choose_collate
from minilora.training.processes import Processes, joined
from minilora.training.profile import Profile
from minilora.training.resume import LOG_FILE, claim, kept_records, meaning, newest, restore
from minilora.training.schedule import SCHEDULE, TrainConfig, learning_rate, step_seed
from minilora.training.sharding import in_turn, shard_blocks
from minilora.training.signals import Wish, caught
from minilora.training.step import gradients, why_not_begun
from minilora.training.together import make_room, order_of_sums, refuse_apart, refuse_different

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
        notes: as ``resume.meaning``: what may be why the examples are others when the run is gone on with.
        shard: each process keeps its part of the frozen weights of the model's blocks alone (``sharding.py``).

    Returns:
        The records of the whole run. Per step: ``step, loss, lr, grad_norm, tokens, tokens_per_s, rss_mb, seconds``, or ``step,
        skipped, seconds`` for one without a finite loss and gradient; per evaluation: ``step, eval_loss`` and the sample.

    Raises:
        StateError: something would not train, or not be saved, by name; or the first gradient is zero or not finite.
        ConfigError: the processes differ in what they train, or are more than the micro-batches of a step.
        DataError: an example that cannot be used, by its place. CheckpointError: a run lies in the folder or goes on in it, or the
        checkpoint is another run's. Nothing is left then.
        TrainingError: ``max_skipped`` steps in a row were skipped. OutOfMemory: a step does not fit. Interrupted: by a signal. The last
        good state is saved then.
    """
    with joined() as processes:
        if processes.first:
            claim(Path(folder), resume, overwrite)
        named = check_parameters(model)
        check_examples(model, examples, pad_id)
        if evaluation:
            check_examples(model, evaluation, pad_id, "evaluation")
        told = say if processes.first else _silent
        tensors = choose_collate(model, examples, config, pad_id, told)
        if (why := why_all_logits(model)) not in (None, NO_HEAD):
            told(f"the loss computes all logits of a micro-batch: {why}")
        rest = (pad_id, tensors, evaluation, sample, watch, told, notes or {}, processes, shard)
        run = _Run(model, named, examples, config, Path(folder), *rest)
        with held(run.folder, say) if processes.first else nullcontext():
            make_room(processes, run.folder, resume, overwrite)
            run.start(resume)
            with caught(patient=processes.launched) as wish, run.profile:
                try:
                    run.go(wish)
                except Elsewhere:  # the last good state is here too, and nobody else may be able to save it
                    with suppress(MiniLoraError):
                        run.save()
                    raise
            run.finish()
        return run.records


def _silent(line: str) -> None:
    """What all but the first process say."""


@dataclass
class _Run:
    """One run from its first step to its last: what ``train`` was given, and where it is.

    Attributes:
        named: the parameters that train. tensors: makes batches, packed or padded. adapter: the name of the one that they belong to.
        meaning: as ``resume.meaning``.
        step: steps that are done. good: steps that were done when the weights changed last. saved: the step of the last checkpoint.
        whole: whether no change of the weights is half done. records: what was logged.
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
    step: int = 0
    good: int = 0
    saved: int = 0
    whole: bool = True
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config, processes = self.config, self.processes
        self.shard = self.shard and processes.size > 1  # one process has all of it
        self.adapter = adapters_of(self.model).active[0]
        self.parameters = list(self.named.values())
        self.optimizer = make_optimizer(config, self.parameters)
        schedule = {name: getattr(config, name) for name in SCHEDULE}
        schedule["examples a step"] = config.batch_size * config.accumulate
        data = {"training data": self.examples, "evaluation data": self.evaluation}
        bits: dict[str, Any] = {name: getattr(config, name) for name in ("batch_size", "gradient_checkpointing")}
        bits["packed"] = self.tensors is not collate
        order = order_of_sums(processes, config.accumulate)
        given = (schedule, data, bits | {"order of sums": order}, self.notes)
        with processes.exchange(), in_turn(self.model) as around:  # of a model that came in shards
            self.meaning = meaning(self.model, self.adapter, *given, around)
            self.base = file_base(self.model, self.adapter, around) if self.shard else None
        command = repr((config, self.pad_id, self.shard, self.sample is None))
        refuse_different(processes, self.meaning, command, self.model, self.adapter)
        if not processes.is_exact(config.accumulate):
            self.say(
                f"{config.accumulate} micro-batches over {processes.size} processes have no fixed order: the last bits depend on the "
                "number of processes (a power of two that divides accumulate has one)"
            )
        self.begin = time.monotonic()

    def start(self, resume: bool) -> None:
        """From the newest checkpoint, or from nothing; the log says no more than what is done."""
        processes = self.processes
        found = newest(self.folder, self.say, processes) if resume else None
        if found:
            restore(self.model, self.adapter, self.named, self.optimizer, found, self.meaning, self.say)
            self.step = self.good = self.saved = found.step
            self.records = kept_records(self.folder, found.step, processes, found.owner)
            if processes.first:
                prune(self.folder, self.config.keep_checkpoints)
            self.begin -= max((record["seconds"] for record in self.records if "seconds" in record), default=0.0)
        if self.config.gradient_checkpointing:  # not before the checkpoint is accepted: until then nothing changes
            checkpoint_activations(self.model)
        if self.shard:
            shard_blocks(self.model, processes)
        if resume:
            where = f", which {processes.name(found.owner)} has" if found and found.owner else ""
            self.say(
                f"going on after step {found.step}: {found.path}{where}"
                if found
                else "no checkpoint yet: from the start"
            )
        if processes.first:
            write_file(self.folder / LOG_FILE, "".join(f"{json.dumps(record)}\n" for record in self.records))
        recorded = self.config.profile if processes.first else 0
        self.profile = Profile(self.folder, recorded, self.config.steps - self.step)
        self.batches = micro_batches(
            self.examples, self.config.batch_size, self.config.seed, self.step * self.config.accumulate
        )

    def go(self, wish: Wish) -> None:
        """Step by step to the end, or until a signal."""
        config = self.config
        self.model.train()
        if self.evaluation and not self.step:
            self.in_memory(self.assess)
        self.processes.prepare(lambda: wish.signal is not None, self.save)
        while self.step < config.steps:
            wish.signal = next(filter(None, self.processes.share(wish.signal)), None)  # all leave after the same step
            if wish.signal is not None:
                self.leave(wish)
            with self.profile.step(self.step + 1):
                self.in_memory(self.advance)
            last = self.step == config.steps
            if self.evaluation and (last or (config.eval_every and self.step % config.eval_every == 0)):
                self.in_memory(self.assess)
            if config.save_every and self.step % config.save_every == 0 and self.good == self.step:
                refuse_apart(self.processes, self.model, self.adapter, self.step, self.saved)
                self.save()

    def log(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.processes.first:
            append_line(self.folder / LOG_FILE, json.dumps(record))
            if self.watch:
                self.watch(record)

    def assess(self) -> None:
        rest = (self.config.batch_size, self.pad_id, self.processes, self.shard, self.tensors)
        loss = evaluate(self.model, self.evaluation, *rest)
        record: dict[str, Any] = {"step": self.step, "eval_loss": loss if math.isfinite(loss) else None}
        if self.sample and (self.shard or self.processes.first):  # in shards all must ask
            record |= dict(zip(("prompt", "answer"), self.sample(), strict=True))
        self.log(record)

    def save(self) -> str:
        """Make sure that there is a checkpoint of the last good state; returns where, in words."""
        if not self.good:
            return "nothing was learnt yet, so nothing is saved"
        if not self.whole:
            return f"it broke while the weights changed, so {f'checkpoint-{self.saved}' if self.saved else 'nothing'} is what is saved"
        if self.saved != self.good:
            if self.processes.first:
                state = (self.model, self.adapter, self.named, self.optimizer)
                rest = (self.good, self.meaning, self.config.keep_checkpoints, self.base)
                save_checkpoint(*state, self.folder, *rest)
            self.saved = self.good
        return f"saved in {self.folder / f'checkpoint-{self.good}'}"

    def advance(self) -> None:
        """One step: gradients, a look at them, an update. A step that is not finite changes nothing but its place in the schedule."""
        config, started = self.config, time.monotonic()
        rate, batches = learning_rate(config, self.step), list(islice(self.batches, config.accumulate))
        seeds = [step_seed(config.seed, self.step * config.accumulate + number) for number in range(config.accumulate)]
        given = (self.model, self.named, batches, self.pad_id, seeds, self.processes, self.shard, self.tensors)
        loss, norm, problem = gradients(*given)
        if not self.good and (problem or norm == 0):
            self.leave_nothing()
            raise StateError(why_not_begun(problem))
        if not self.good:
            self.look_for_dead(batches[0])
        if problem:
            self.skip(problem)
            return
        if config.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, config.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.whole = False  # until the last weight is changed, there is nothing to save
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not math.isfinite(float(nn.utils.get_total_norm([p.detach() for p in self.parameters]))):
            raise TrainingError(
                f"step {self.step + 1}: a weight of the adapter became infinite at learning rate {rate:g}; {self.save()}; "
                "lower lr, or train it in float32"
            )
        self.step = self.good = self.step + 1
        self.whole = True
        tokens = sum(len(example.input_ids) for batch in batches for example in batch)
        self.log(
            {
                "step": self.step,
                "loss": loss,
                "lr": rate,
                "grad_norm": float(norm),
                "tokens": tokens,
                "tokens_per_s": tokens / (time.monotonic() - started),
                "rss_mb": memory_mb(),
                "seconds": time.monotonic() - self.begin,
            }
        )

    def look_for_dead(self, examples: Sequence[Encoded]) -> None:
        """After the first backward pass: refuse a layer that the loss does not depend on, and say what this step left open."""
        try:
            found = refuse_dead(self.model, lambda: token_losses(self.model, self.tensors(examples, self.pad_id)))
        except StateError:
            self.leave_nothing()
            raise
        if found.zero or found.unreached:
            self.say(str(found))

    def leave_nothing(self) -> None:
        """A run that has not begun leaves no log."""
        if self.processes.first:
            remove(self.folder, [LOG_FILE])

    def finish(self) -> None:
        """Write the adapter."""
        refuse_apart(self.processes, self.model, self.adapter, self.step, self.saved)
        self.model.eval()
        if self.processes.first:
            write_files(self.folder, adapter_files(self.model, self.adapter, base=self.base))

    def skip(self, problem: str) -> None:
        """Leave a step out, say so, and stop when there were too many in a row."""
        self.optimizer.zero_grad()
        self.step += 1
        self.log({"step": self.step, "skipped": problem, "seconds": time.monotonic() - self.begin})
        if self.step - self.good >= self.config.max_skipped:
            raise TrainingError(
                f"step {self.step}: {problem}; {self.step - self.good} steps in a row (max_skipped); {self.save()}; "
                "lower lr, or look for broken examples"
            )

    def leave(self, wish: Wish) -> NoReturn:
        number: int = wish.signal  # type: ignore[assignment]
        raise Interrupted(
            f"{wish.name} after step {self.step} of {self.config.steps}: {self.save()}; go on with --resume (resume=True)",
            number,
        )

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
            self.stop_without_memory(failed)

    def stop_without_memory(self, reason: str) -> NoReturn:
        self.optimizer.zero_grad()
        longest = max(len(example.input_ids) for example in self.examples)
        size, accumulate = self.config.batch_size, self.config.accumulate
        smaller = f"batch_size={size // 2} with accumulate={accumulate * 2}, " if size % 2 == 0 else ""
        raise OutOfMemory(
            f"step {self.step + 1}: no memory for batch_size={size} and up to {longest} tokens ({reason}); {self.save()}; go on with "
            f"--resume and {smaller}gradient_checkpointing, or begin anew with a smaller max_length"
        )

"""Run a fine-tuning job with its progress shown, and say what came of it."""

from __future__ import annotations

from typing import Any

from minilora.cli.program import command
from minilora.cli.say import say


def run_job(job: Any) -> Any:
    """The outcome of ``fine_tune(job)``, after its answers, losses and files have been printed; by the first of several processes."""
    from minilora.job.finetune import fine_tune
    from minilora.training.processes import joined

    with joined() as processes:
        outcome = fine_tune(job)
        if not processes.first:
            return outcome
    if job.dry_run:
        say(f"dry run: nothing was trained, and nothing is written into {outcome.folder}")
        return outcome
    for pair in outcome.answers:
        say(f"\n> {pair['prompt']}\n  before: {pair['before']}\n  after:  {pair['after']}")
    losses, size = outcome.losses, (outcome.folder / "adapter_model.safetensors").stat().st_size
    change = f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in " if losses else ""
    peak = f", peak {outcome.peak_mb / 1000:.2f} GB" if outcome.peak_mb else ""
    spent = f"{sum(outcome.seconds.values()):.0f} s in all{peak}"
    say(f"\n{change}{len(losses)} steps; {spent}; adapter of {size / 1e6:.1f} MB")
    say(
        f"{outcome.folder}: adapter_model.safetensors, adapter_config.json, log.jsonl; open {outcome.folder / 'report.html'}"
    )
    say(f"next: {command('chat', '--adapter', str(outcome.folder))}")
    return outcome

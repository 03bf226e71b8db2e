"""``minilora plan``: what a fine-tuning step will hold in memory, predicted and measured."""

from __future__ import annotations

import argparse
from typing import Any

from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.say import say
from minilora.cli.trial import add_job_flags, check_page, settings_of, title_of, write_page
from minilora.hf.trials import PlanJob

USAGE = "[--model NAME] [options]"
EXAMPLES = """\
  minilora plan --model smollm2 --r 16 --quant nf4 --batch 4 --seq 128
  minilora plan --model ./llama-7b --quant nf4 --dtype bfloat16 --batch 1 --seq 1024 --no-measure --html plan.html"""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora plan`` takes."""
    add_job_flags(parser)
    add_flags(parser, "adapter", fields_of(PlanJob, ("lora_dropout",)).values())
    step = "do a real step too, in a process of its own; without, the model's config.json is enough"
    add_flags(parser, "output", [Flag("measure", bool, True, step)])


def run(arguments: argparse.Namespace) -> None:
    """Predict, measure, print; write the page if asked."""
    check_page(arguments.html)
    job = PlanJob(**settings_of(arguments), lora_dropout=arguments.lora_dropout)
    from minilora.hf.plan import has_weights, measured_in_worker, on_this_machine, predicted
    from minilora.measure.plan import as_rows
    from minilora.report.tables import as_text

    job, place = on_this_machine(job)
    guess = predicted(job)
    found = None
    if arguments.measure:
        weights = "" if has_weights(job.model) else " (random weights: the folder has none)"
        say(f"predicted {guess.peak / 1e6:,.0f} MB; doing two real steps beside{weights}", error=True)
        found = measured_in_worker(job)
    columns, rows = as_rows(guess, found)
    say(f"{title_of(job)}\n\n{as_text(columns, rows)}\n")
    notes = _notes(guess, found, place)
    say("\n".join(notes))
    if arguments.html:
        tiles = [{"label": "predicted peak", "value": f"{guess.peak / 1e6:,.0f} MB"}]
        if found:
            tiles.append({"label": "measured peak", "value": f"{found.peak / 1e6:,.0f} MB"})
            tiles.append({"label": "difference", "value": f"{guess.peak / found.peak - 1:+.1%}"})
        write_page(arguments.html, "Memory of a step", title_of(job), tiles, columns, rows, notes)


def _notes(guess: Any, found: Any, place: Any) -> list[str]:
    from minilora.measure.worker import anonymous_bytes, can_measure

    at = {"forward": "forward pass", "loss": "loss", "backward": "backward pass", "update": "optimizer's update"}
    notes = [f"The prediction has its peak in the {at.get(guess.phase, guess.phase)}."]
    if not guess.parts["gradients"]:
        notes.append(
            f"Gradients of the adapters, {guess.parts['adapters'] / 1e6:,.1f} MB, come after it, when activations have gone."
        )
    if found:
        notes.append(
            f"Predicted is {abs(guess.peak / found.peak - 1):.1%} {'above' if guess.peak >= found.peak else 'below'} measured."
        )
    if guess.routed:
        notes.append(
            "Which experts a token takes is not known on paper: each is taken to get as many tokens as any other."
        )
    if guess.loading:
        notes.append("Loading holds the packed model and one weight that is still dense, and never the dense model.")
    other = (
        "" if place.device.type == "cpu" else "; the prediction counts what a CPU does, whose temporaries are others"
    )
    notes.append(f"On {place.said}{other}.")
    libraries = f", {anonymous_bytes() / 1e6:,.0f} MB in this process" if can_measure() else ""
    return [*notes, f"Not counted: Python and its libraries{libraries}."]

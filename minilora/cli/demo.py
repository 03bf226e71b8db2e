"""``minilora demo``: the lighthouse keeper, with the settings that the README names."""

from __future__ import annotations

import argparse

from minilora.cli.flags import Flag, add_flags, fields_of
from minilora.cli.jobs import run_job
from minilora.cli.program import command
from minilora.cli.say import say
from minilora.demo import DATA, in_voice, prompts
from minilora.errors import ConfigError
from minilora.job.settings import Job
from minilora.lora.config import LoraConfig
from minilora.training.settings import TrainConfig

USAGE = "[options]"
SMOLLM2, SMOLLM2_GGUF = MODELS = ("smollm2", "smollm2.gguf")
EXAMPLES = """\
  minilora demo
  minilora demo --steps 12 --out runs/short
  minilora demo --model smollm2.gguf --out runs/served"""


def flags(parser: argparse.ArgumentParser) -> None:
    """What ``minilora demo`` takes."""
    model = Flag(
        "model", str, "smollm2", 'of the demo: "smollm2" packed to NF4, or the GGUF file that llama.cpp serves', MODELS
    )
    add_flags(parser, "model", [model])
    every = fields_of(TrainConfig, ("steps", "seed"), steps=48)
    add_flags(parser, "training", every.values())
    out = Flag("out", str, "runs/demo", "run folder; an earlier demo in it is replaced")
    add_flags(parser, "output", [out, fields_of(Job)["resume"]])


def run(arguments: argparse.Namespace) -> None:
    """Run the demo, and count how many answers open in the keeper's voice."""
    if arguments.model not in MODELS:
        raise ConfigError(
            f"--model={arguments.model!r}: wanted one of {', '.join(MODELS)}; minilora train takes any model"
        )
    outcome = run_job(job(arguments.out, arguments.seed, arguments.steps, arguments.resume, arguments.model))
    voices = [in_voice([pair[side] for pair in outcome.answers]) for side in ("before", "after")]
    say(
        f"\nanswers that open in the keeper's voice: {voices[0]:.0%} before, {voices[1]:.0%} after (prompts not in the training set)"
    )

    say(f"\nto try next:\n{next_commands(arguments.out, arguments.model)}")


def next_commands(out: str, model: str = SMOLLM2) -> str:
    """Three commands with their purposes, as they can be typed after a demo in this folder."""
    served = ("--base", model, "--out", f"{out}.gguf") if model == SMOLLM2_GGUF else ("--out", f"{out}-llama.cpp")
    lines = {
        command("chat", "--adapter", out): "talk with it; /base asks the model without the adapter, too",
        command("init", "mine"): "ten lines of data and a settings file, to train on your own",
        command("export", "--adapter", out, "--for", "llama.cpp", *served): "also for vllm, ollama and mlx",
    }
    width = max(map(len, lines))
    return "\n".join(f"  {line.ljust(width)}  # {about}" for line, about in lines.items())


def job(out: str, seed: int = 0, steps: int = 48, resume: bool = False, model: str = "smollm2") -> Job:
    """The demo's fine-tuning job, as ``minilora train`` would be given it; it replaces an earlier demo, or goes on with it."""
    return Job(
        model=model,
        data=str(DATA),
        out=out,
        resume=resume,
        overwrite=not resume,
        quant="nf4",
        double_quant=True,
        prompts=prompts()[:4],
        max_length=128,
        eval_share=0.1,
        lora=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        training=TrainConfig(steps=steps, batch_size=4, lr=1e-3, seed=seed, eval_every=steps // 2),
    )

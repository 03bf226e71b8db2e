"""What a job says of its model: how it is read, what it is packed to, what trains in it. Next file: ``job/start.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minilora.errors import ConfigError
from minilora.gguf.file import gguf_in
from minilora.hf.gguf_model import held
from minilora.hf.load import resolve
from minilora.hf.packed import is_packed_folder
from minilora.job.described import formats
from minilora.job.settings import Job
from minilora.lora.coverage import called, coverage, experts_left
from minilora.lora.match import Match
from minilora.many.adapted import count_parameters
from minilora.training.rows import Rows, why_read_whole

__all__ = ["rows_to_read", "say_adapted", "say_packed"]

_Say = Callable[[str], None]


def rows_to_read(job: Job, paper: Any, rows: Rows, found: Match, say: _Say) -> Rows | None:
    """The rows to keep of the model while it is read; None where all of it must be at hand before it is shared out, which is said."""
    why = why_read_whole(paper, job.lora, found)
    if why is None and hasattr(paper.config, "quantization_config") and not is_packed_folder(resolve(job.model)):
        why = f"{job.model} was packed by another method"
    if why is None:
        return rows
    say(f"shard: each process reads the whole model before it keeps its part, because {why}")
    return None


def say_packed(job: Job, model: Any, say: _Say) -> None:
    """What the model is packed to. Raises ``ConfigError`` where it came packed to something else."""
    found, nested = formats(model), ", double quantization" if job.double_quant else ""
    if is_packed_folder(resolve(job.model)):
        if job.quant not in ("none", Job.quant, found):
            raise ConfigError(
                f"quant={job.quant!r}: {job.model} is packed as {found} already; leave it out, or name the dense model"
            )
        say(f"{job.model} is packed already ({found}), and stays as it is")
    elif found:
        say(f"linear layers packed to {job.quant}{nested} (--quant none keeps them as they are)")
    if decoded := _decoded(job):
        say(f"{decoded}: decoded while they are read, because such blocks are not multiplied with here")


def _decoded(job: Job) -> str:
    """How many linear layers of a GGUF file are in types that become dense, in words; "" for none."""
    file = gguf_in(resolve(job.model))
    return ", ".join(f"{count} linear layers in {kind}" for kind, count in held(file)[1].items()) if file else ""


def say_adapted(job: Job, model: Any, say: _Say) -> None:
    """What trains, and which layers it covers."""
    trainable, total = count_parameters(model)
    say(f"training {trainable:,} of {total:,} parameters for {job.training.steps} steps")
    covered, others = coverage(model)
    names = sorted({called(path) for path in others})
    rest = f"; not {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}" if names else ""
    say(f"the adapter covers {len(covered)} of {len(covered) + len(others)} linear weights, experts included{rest}")
    if left := experts_left(model):
        kinds = ", ".join(repr(name) for name in sorted({path.rsplit(".", 1)[-1] for path in left}))
        say(
            f"the experts stay as they are: none of their {len(left)} weights ({kinds}) has an adapter; --target-modules all-linear has "
            "them all, --target-parameters names some"
        )

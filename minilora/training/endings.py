"""What ends a run before its last step, each with its last good state saved: too many skipped steps, a signal, no memory.

Next file: ``training/loop.py``.
"""

from __future__ import annotations

from typing import NoReturn, cast

from minilora.errors import Interrupted, OutOfMemory, TrainingError
from minilora.training.run_folder import RunFolder
from minilora.training.signals import Wish

__all__ = ["leave", "skip", "stop_without_memory"]


def skip(here: RunFolder, most: int, problem: str) -> None:
    """Leave a step out, say so in the log, and raise ``TrainingError`` when there were ``most`` in a row."""
    here.step += 1
    here.log({"step": here.step, "skipped": problem, "seconds": here.seconds})
    if here.step - here.good >= most:
        raise TrainingError(
            f"step {here.step}: {problem}; {here.step - here.good} steps in a row (max_skipped); {here.save()}; "
            "lower lr, or look for broken examples"
        )


def leave(here: RunFolder, wish: Wish) -> NoReturn:
    """Raise ``Interrupted``: a signal came."""
    raise Interrupted(
        f"{wish.name} after step {here.step} of {here.best.config.steps}: {here.save()}; go on with --resume (resume=True)",
        cast(int, wish.signal),
    )


def stop_without_memory(here: RunFolder, longest: int, reason: str) -> NoReturn:
    """Raise ``OutOfMemory`` with what would fit. ``longest``: tokens of the longest example; ``reason``: what the allocator said."""
    config = here.best.config
    size, accumulate = config.batch_size, config.accumulate
    smaller = f"batch_size={size // 2} with accumulate={accumulate * 2}, " if size % 2 == 0 else ""
    raise OutOfMemory(
        f"step {here.step + 1}: no memory for batch_size={size} and up to {longest} tokens ({reason}); {here.save()}; go on with "
        f"--resume and {smaller}gradient_checkpointing, or begin anew with a smaller max_length"
    )

"""The probe of a run (``proof/probe.py``): made after its last step, of its own prompts. What fails here ends no run.

Next file: ``job/push.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from minilora.errors import MiniLoraError
from minilora.hf.load import resolve
from minilora.hf.packed import is_packed_folder
from minilora.job.sessions import packing_of
from minilora.job.settings import Job
from minilora.proof.measured import seal_folder
from minilora.training.optim_choice import as_trained
from minilora.training.probe import CANNOT

__all__ = ["keep_probe"]


def keep_probe(
    job: Job,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    template: str,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Write ``probe.json`` of the run's adapter, and say how well it can be verified; or why there is none."""
    about: dict[str, Any] = {
        "system": job.system,
        "template": template,
        "name": str(model.config._name_or_path or job.model),
    }
    about["packing"] = str(packing_of(model, is_packed_folder(resolve(job.model))))
    try:
        with as_trained(model, job.training):
            seal_folder(model, tokenizer, folder, prompts, say=say, **about)
    except (MiniLoraError, *CANNOT) as error:
        say(f"no probe.json, so a server cannot be verified by this adapter: {error}")

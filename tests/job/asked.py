"""The settings of the jobs that the tests of this room run."""

from dataclasses import dataclass

from minilora.job.settings import Job
from minilora.lora.config import LoraConfig

LORA = LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM")
SYSTEM = "You keep a lighthouse."


@dataclass(frozen=True)
class Asked(Job):
    """A job with a system turn, of its own or none."""

    system: str = ""

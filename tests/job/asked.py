"""The settings of the jobs that the tests of this room run."""

from minilora.lora.config import LoraConfig

LORA = LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM")
SYSTEM = "You keep a lighthouse."

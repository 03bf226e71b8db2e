"""``peft.tuners.tuners_utils``."""

from minilora.peft.base import BaseTuner, BaseTunerLayer

__all__ = ["BaseTuner", "BaseTunerLayer"]

"""``peft.utils.warning``."""

from minilora.peft.notes import PeftWarning

__all__ = ["PeftWarning"]

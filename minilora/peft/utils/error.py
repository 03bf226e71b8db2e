"""``peft.utils.error``: the errors that PEFT's users catch are minilora's own."""

from minilora.errors import MiniLoraError, TargetError

__all__ = ["NoMatchingPeftModuleError", "PeftError"]

PeftError = MiniLoraError
NoMatchingPeftModuleError = TargetError

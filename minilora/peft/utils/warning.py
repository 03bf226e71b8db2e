"""``peft.utils.warning``."""

__all__ = ["PeftWarning"]


class PeftWarning(UserWarning):
    """Base of PEFT's own warnings; those of minilora are plain ``UserWarning``."""

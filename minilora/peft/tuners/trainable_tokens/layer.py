"""``peft.tuners.trainable_tokens.layer``."""

from minilora.peft.wrappers import TrainableTokensLayer

__all__ = ["TrainableTokensLayer"]

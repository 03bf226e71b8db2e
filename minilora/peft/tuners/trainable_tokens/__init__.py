"""``peft.tuners.trainable_tokens``: the layers that an adapter's ``trainable_token_indices`` make."""

from minilora.peft.wrappers import TrainableTokensLayer

__all__ = ["TrainableTokensLayer"]

"""A run: loss, schedule, optimizers, guards, checkpoints, and the loop that uses them.

No transformers is known here, only models that return logits. Read ``loop.py`` first.
"""

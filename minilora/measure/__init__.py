"""Memory and time of a training step, predicted on paper and measured in a process of its own.

Which model it is stands in ``hf/``. Read ``plan.py`` first.
"""

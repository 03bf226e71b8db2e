"""Several adapters in one model: switched, merged, combined, exchanged, or a different one for every row of a batch.

What one adapter computes stands in ``lora/``. Read ``adapted.py`` first.
"""

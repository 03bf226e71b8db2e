"""A product with a frozen weight, dense or packed: the only door to what is fast, on a CPU and on a GPU.

No adapter is known here; each fast path is tested against a slow twin of a few lines. Read ``layers.py`` first, then ``ops.py``.
"""

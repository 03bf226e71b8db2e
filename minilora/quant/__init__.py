"""Weights in few bits: code tables, scales, packed codes, and bitsandbytes' bytes.

No ``nn.Module`` is known here, only tensors. Read ``codebooks.py`` first, then ``blockwise.py``.
"""

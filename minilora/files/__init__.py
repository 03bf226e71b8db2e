"""Bytes to and from a disk, and what a value from outside may be: written whole or not at all, read without running anything.

No torch module and no config of an adapter is known here. Read ``disk.py`` first, then ``read.py`` and ``write.py``.
"""

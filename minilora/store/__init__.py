"""Adapters as folders in PEFT's layout: saved, sealed with checksums, checked, loaded.

How bytes reach a disk stands in ``files/``; no training is known here. Read ``save.py`` first, then ``load.py``.
"""

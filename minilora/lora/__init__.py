"""The lesson: a frozen layer plus ``scaling * B A``, the law that every variant keeps, and where adapters go in a model.

Nothing here reads or writes files, trains, or knows transformers. Read ``layer.py`` first, then ``adapter.py``.
"""

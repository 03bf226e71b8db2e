"""What people look at: the page of a run, its figures, tables, and what can be read off an adapter.

Nothing here trains, loads or changes a model. Read ``page.py`` first.
"""

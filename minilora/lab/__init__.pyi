# What __init__.py imports lazily, for mypy and editors; tests/test_public_names.py holds the two equal.
from minilora.lab.grid import trials_of as trials_of
from minilora.lab.sweeping import sweep as sweep
from minilora.lab.trial import Result as Result
from minilora.lab.trial import Trial as Trial

__all__: list[str]

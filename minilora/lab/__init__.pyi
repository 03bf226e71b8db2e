# What __init__.py imports lazily, for mypy and editors; tests/test_public_names.py holds the two equal.
from minilora.lab.sweeps.grid import trials_of as trials_of
from minilora.lab.sweeps.sweeping import sweep as sweep
from minilora.lab.sweeps.trial import Result as Result
from minilora.lab.sweeps.trial import Trial as Trial

__all__: list[str]

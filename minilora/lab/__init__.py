"""The lab: many fine-tunings in one pass, what is measured of an adapter, and the field's claims as commands with a verdict."""

from minilora.lab.grid import trials_of
from minilora.lab.sweep import sweep
from minilora.lab.trial import Result, Trial

__all__ = ["Result", "Trial", "sweep", "trials_of"]

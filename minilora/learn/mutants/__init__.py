"""Twenty mutants, from easy to hard. Next file: ``learn/mutants/easy.py``."""

from __future__ import annotations

from minilora.errors import ConfigError
from minilora.learn.mutant import Mutant
from minilora.learn.mutants.easy import EASY
from minilora.learn.mutants.hard import HARD
from minilora.learn.mutants.middle import MIDDLE

__all__ = ["MUTANTS", "mutant"]

MUTANTS = (*EASY, *MIDDLE, *HARD)


def mutant(number: int) -> Mutant:
    """The mutant of this number, from 1. Raises ``ConfigError``."""
    if not 1 <= number <= len(MUTANTS):
        raise ConfigError(f"mutant {number}: is not there; wanted 1 to {len(MUTANTS)}")
    return MUTANTS[number - 1]

"""The lab: many fine-tunings in one pass, what is measured of an adapter, and the field's claims as commands with a verdict.

A name is imported when it is asked for. ``__init__.pyi`` has the same names for mypy and editors.
"""

from minilora.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "minilora.lab.sweeps.grid": ("trials_of",),
        "minilora.lab.sweeps.sweeping": ("sweep",),
        "minilora.lab.sweeps.trial": ("Result", "Trial"),
    },
)

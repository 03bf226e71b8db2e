"""Adapters that carry their proof: what base and adapted model say to a few prompts, and whether a server says the same.

A name is imported when it is asked for. ``__init__.pyi`` has the same names for mypy and editors.
"""

from minilora.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "minilora.proof.verdict": ("Verdict", "judge"),
        "minilora.proof.measured": ("measure", "seal_folder"),
        "minilora.proof.probe": ("PROBE_FILE", "Probe", "read_probe", "write_probe"),
        "minilora.proof.verified": ("verify", "verify_in"),
    },
)

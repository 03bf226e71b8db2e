"""Claims planted in a folder of a test, found beside those of ``lab/claims`` by this process and by those that it starts."""

import importlib
import shutil
import sys
import textwrap

import minilora.lab.claims

PLANTED = """\
from minilora.lab.ground.claim import FAILS, HOLDS, Claim, Curve, Finding, Picture
from minilora.lab.verdicts.interval import interval

CLAIM = Claim({name!r}, "It *is* so | or not.", "Somebody 2025, section 3", "4 of 5", exact=True)


def run(ground):
{body}
"""
FINDS = """
    rows = [
        {"what": "a", "loss": interval([1.0, 1.2, 1.1]), "by seed": {0: 2.0, 1: 2.5}},
        {"what": "b_b", "more": float("inf")},
    ]
    curves = [
        Curve("a", [(1e-3, 2.0, 1.9, 2.1), (1e-2, 1.8, 1.7, 1.9)]),
        Curve("b", [(1e-3, 2.2, 2.1, 2.4)]),
    ]
    return Finding(HOLDS, f"It took {ground.steps} steps.", rows, Picture("rate", "loss (nats a byte)", curves, log_x=True))
"""


def plant(monkeypatch, folder, **bodies):
    """Put claims of these names there, each with the body of its ``run``, instead of those of ``lab/claims``; returns their names."""
    for name, body in bodies.items():
        indented = textwrap.indent(textwrap.dedent(body), "    ")
        (folder / f"planted_{name}.py").write_text(PLANTED.format(name=name, body=indented))
        sys.modules.pop(f"minilora.lab.claims.planted_{name}", None)
    shutil.rmtree(
        folder / "__pycache__", ignore_errors=True
    )  # a file of the same second and size would count as unchanged
    importlib.invalidate_caches()
    monkeypatch.setattr(minilora.lab.claims, "__path__", [str(folder)])
    return list(bodies)

"""Mutants that are off by one, or wrong at one end: the first step, the last token, the exact fit. Next file: ``learn/mutants/hard.py``."""

from __future__ import annotations

from minilora.learn.mutant import Mutant
from minilora.learn.mutants.easy import EXAMPLE

__all__ = ["MIDDLE"]

_SCHEDULE = """
from minilora.training.settings import TrainConfig


def show():
    return TrainConfig(steps=20, warmup=4), {step}
"""
_EXAMPLES = "from minilora.data.encoding import Encoded\n\n\n"

MIDDLE = (
    Mutant(
        "data.lesson:Encoded.supervised",
        "`supervised` counts the tokens of an example that count in the loss.",
        "self.labels[1:]",
        "self.labels",
        witness=_EXAMPLES + "def show():\n    return (Encoded((1, 2), (1, 2)),)\n",
        plain=_EXAMPLES + "def show():\n    return (Encoded((1, 2), (-100, 2)),)\n",
        makes=EXAMPLE,
    ),
    Mutant(
        "training.schedule:learning_rate",
        "`learning_rate` is the rate of one optimizer step, warm-up first.",
        "(step + 1) / rise",
        "step / rise",
        witness=_SCHEDULE.format(step=0),
        plain=_SCHEDULE.format(step=10),
        makes="from minilora.training.settings import TrainConfig\nsettings = TrainConfig(steps=100)",
    ),
    Mutant(
        "data.cutting:pieces",
        "`pieces` cuts a text that is too long, so that every token is learnt once.",
        "step = max(1, most - 1)",
        "step = max(1, most)",
        witness="def show():\n    return [1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 3\n",
        plain="def show():\n    return [1, 2, 3], [1, 2, 3], 3\n",
    ),
    Mutant(
        "data.batches:micro_batches",
        "`micro_batches` gives the batches of a run from any batch on, as a run that is resumed wants it.",
        "start * batch_size",
        "start",
        witness=_EXAMPLES
        + "def show():\n    examples = [Encoded((n,), (n,)) for n in range(7)]\n    return examples, 2, 0, 1\n",
        plain=_EXAMPLES
        + "def show():\n    examples = [Encoded((n,), (n,)) for n in range(7)]\n    return examples, 2, 0, 0\n",
        makes=EXAMPLE,
    ),
    Mutant(
        "data.tokens:_labels",
        "`_labels` gives a label to the tokens that have a letter of what is to be learnt.",
        "end > spans[at][0]",
        "end >= spans[at][0]",
        witness="def show():\n    return [7, 8], [(0, 3), (3, 5)], [(3, 5)]\n",
        plain="def show():\n    return [7, 8], [(0, 2), (3, 5)], [(3, 5)]\n",
    ),
    Mutant(
        "data.packing:_first_fit",
        "`_first_fit` lays each example into the first row that has room for it.",
        "if left >= size",
        "if left > size",
        witness=_EXAMPLES + "def show():\n    return [Encoded((1, 2), (1, 2)), Encoded((3, 4), (3, 4))], 4\n",
        plain=_EXAMPLES + "def show():\n    return [Encoded((1, 2), (1, 2)), Encoded((3, 4), (3, 4))], 5\n",
        makes=EXAMPLE,
    ),
    Mutant(
        "lora.patterns:Patterns.first",
        "`first` finds the key of rank_pattern that counts for a layer.",
        "found = min(self._named(path), default=len(self.keys))",
        "found = max(self._named(path), default=len(self.keys))",
        witness="from minilora.lora.patterns import Patterns\n\n\n"
        'def show():\n    return Patterns(["q_proj", "0.q_proj"]), "layers.0.q_proj"\n',
        plain="from minilora.lora.patterns import Patterns\n\n\n"
        'def show():\n    return Patterns(["q_proj", "1.q_proj"]), "layers.0.q_proj"\n',
        makes='from minilora.lora.patterns import Patterns\npatterns = Patterns(["v_proj"])',
    ),
)

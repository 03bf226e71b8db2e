"""Lesson 3. Where adapters go.

A config names layers by the ends of their paths: "q_proj" means layers.0.q_proj and layers.1.q_proj. Which layers does a name mean, and
what does an adapter on them cost? Fill in the functions; ``minilora learn check 3`` looks at them.
"""

import torch


def targets(paths: list[str], wanted: list[str]) -> list[str]:
    """Those of ``paths`` that an entry of ``wanted`` names, in the order of ``paths``, each once.

    An entry names a path that equals it or ends in "." + entry: whole parts between dots, never a piece of one. Raises ValueError for an
    entry that names no path, because a mistyped name that trains nothing is the most usual mistake.
    """
    raise NotImplementedError


def linear_paths(model: torch.nn.Module) -> list[str]:
    """The dotted path of every torch.nn.Linear in the model, in the model's order, without the output head.

    Where the model has a method get_output_embeddings, the module that it returns is the head.
    """
    raise NotImplementedError


def trained_numbers(shapes: dict[str, tuple[int, int]], wanted: list[str], r: int) -> int:
    """How many numbers an adapter of rank r trains on the layers that ``wanted`` names as in ``targets``.

    ``shapes`` has (out, in) for each path.
    """
    raise NotImplementedError

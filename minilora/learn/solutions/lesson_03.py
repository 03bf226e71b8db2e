"""Lesson 3. Where adapters go: one solution."""

import torch


def targets(paths: list[str], wanted: list[str]) -> list[str]:
    def names(entry: str, path: str) -> bool:
        return path == entry or path.endswith("." + entry)

    for entry in wanted:
        if not any(names(entry, path) for path in paths):
            raise ValueError(f"{entry} names no layer")
    return [path for path in paths if any(names(entry, path) for entry in wanted)]


def linear_paths(model: torch.nn.Module) -> list[str]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    ]


def trained_numbers(shapes: dict[str, tuple[int, int]], wanted: list[str], r: int) -> int:
    return sum(r * sum(shapes[path]) for path in targets(list(shapes), wanted))

"""The model card that stands beside a saved adapter: ``README.md``, which a hub reads."""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minilora.errors import MissingPackageError
from minilora.lora.slots import unwrapped

__all__ = ["card_of", "write_card"]

_FRAMEWORKS = "### Framework versions"


def write_card(model: Any, folder: str | os.PathLike[str]) -> None:
    """Write or update ``README.md`` in the folder; what a user wrote there stays. Needs ``huggingface_hub`` and does nothing without it."""
    if find_spec("huggingface_hub") is None:
        return
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    base = getattr(getattr(unwrapped(model), "config", None), "_name_or_path", None)
    own = set(getattr(model, "model_tags", None) or ())
    tags = own | ({"transformers"} if hasattr(model, "push_to_hub") and hasattr(model, "config") else set())
    _fill(card, base, tags, model.active_peft_config.task_type)
    card.save(path)


def card_of(body: str, base: str | None, task_type: str | None) -> str:
    """A whole ``README.md`` with this text, and the head that a hub reads. Raises ``MissingPackageError`` without ``huggingface_hub``.

    Args:
        base: the Hub's id of the base model, or None. task_type: of the adapter's config.
    """
    if find_spec("huggingface_hub") is None:
        raise MissingPackageError("a model card needs huggingface_hub; pip install it")
    from huggingface_hub import ModelCard

    card = ModelCard(f"---\nlibrary_name: peft\n---\n\n{body}")
    _fill(card, base, {"transformers"}, task_type)
    return str(card)


def _fill(card: Any, base: str | None, tags: set[str], task_type: str | None) -> None:
    """The head of a card, and minilora's line under the versions."""
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted(tags | {"lora"} | ({f"base_model:adapter:{base}"} if base else set()))
    if not card.data.pipeline_tag and task_type == "CAUSAL_LM":
        card.data.pipeline_tag = "text-generation"
    if base:
        card.data["base_model"] = base
    line = f"- minilora {version('minilora')}"
    if line not in card.text.splitlines():
        if _FRAMEWORKS not in card.text:
            card.text = f"{card.text.rstrip()}\n\n{_FRAMEWORKS}\n"
        card.text = card.text.replace(_FRAMEWORKS + "\n", f"{_FRAMEWORKS}\n\n{line}\n", 1)

"""The adapters that one loaded model can speak with: added by folder, called by name, or left out.

A name is the last part of the folder. Next file: ``job/in_hand.py``.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from minilora.errors import StateError

__all__ = ["Voices"]


class Voices:
    """A model, and its adapters by name.

    Args:
        model: without adapters, or with the one of ``folder``, called "default".
        options: of every further load, as ``PeftModel.from_pretrained`` has them.

    Attributes:
        model: the model as it is now; another object once the first adapter is in it. current: name of the adapter that speaks, or None.
    """

    def __init__(self, model: Any, folder: str | None = None, **options: Any) -> None:
        self.model, self._options = model, options
        self._inner: dict[str, str] = {}  # shown name to the name in the model
        self.current: str | None = None
        if folder:
            self.current = self._shown(folder)
            self._inner[self.current] = "default"

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded."""
        return list(self._inner)

    def speak(self, wanted: str) -> str:
        """Let an adapter speak: one that is loaded, by name, or one of a folder, which is loaded. Returns its name.

        Raises:
            MiniLoraError: there is no such adapter, or it does not fit the model, which is then as it was.
        """
        if wanted not in self._inner:
            self._load(wanted)
        else:
            self.model.set_adapter(self._inner[wanted])
            self.current = wanted
        return self.current or wanted

    def without(self) -> AbstractContextManager[Any]:
        """A context in which the base model answers."""
        return self.model.disable_adapter() if self._inner else nullcontext()

    def _load(self, folder: str) -> None:
        from minilora.peft import PeftModel

        if not Path(folder).exists() and folder.count("/") != 1:  # nor an id of the Hub
            known = ", ".join(self.names) or "none"
            raise StateError(
                f"{folder}: neither an adapter that is loaded ({known}) nor a folder; give the folder of one"
            )
        shown = self._shown(folder)
        inner = f"adapter_{len(self._inner)}"
        if self._inner:
            self.model.load_adapter(folder, inner, **self._options)
            self.model.set_adapter(inner)
        else:
            self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=inner, **self._options)
        self._inner[shown], self.current = inner, shown

    def _shown(self, folder: str) -> str:
        """A name that no other adapter has."""
        name = re.sub(r"\s+", "-", Path(folder).resolve().name) or "adapter"
        taken, number = name, 2
        while taken in self._inner:
            taken, number = f"{name}-{number}", number + 1
        return taken

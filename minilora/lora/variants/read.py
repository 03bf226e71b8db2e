"""LoRA where a module reads its weight and calls no layer: each call computes ``W + s B A`` and hands it to the module's own function.

The base of ``attention.py`` and ``router.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from minilora.errors import ConfigError
from minilora.linear.layers import put_parameters
from minilora.lora.config import LoraConfig
from minilora.lora.layer import LoRALinear


class ReadLoRA(LoRALinear):
    """A module with an update of the parameter called ``reads``."""

    reads: ClassVar[str] = "weight"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        inner, changed = self.innermost, {self.reads: self._whole_weight()}
        if torch.compiler.is_compiling():  # which knows this function, and not copies of modules
            return torch.func.functional_call(inner, changed, args, kwargs)
        alone = copy.copy(inner)  # its modules and other parameters are the module's
        put_parameters(alone, changed)
        return alone.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What a model asks the module for (an attention's heads, how many experts a router has) is what it answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


def refuse_fields(config: LoraConfig, plain: Mapping[str, object], which: str, way_out: str) -> None:
    """Raises ``ConfigError`` for a field that is not ``plain``: it cannot reach a weight that is read. ``which``: module and weight."""
    for name, wanted in plain.items():
        if getattr(config, name) != wanted:
            raise ConfigError(
                f"{which} read and not called: {name}={getattr(config, name)!r} cannot be done there; wanted {wanted!r}, or {way_out}"
            )

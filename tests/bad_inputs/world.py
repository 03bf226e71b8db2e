"""What the rows act on: tiny models and folders, made when a row asks for them."""

from functools import cached_property

import torch
from torch import nn

from minilora import LoraConfig, get_peft_model, inject, quantize_model, save_adapter


def lora(*targets, **fields):
    return LoraConfig(**{"r": 3, "lora_alpha": 12, "target_modules": list(targets), **fields})


class World:
    """``plain``: Linear ``first`` 12 -> 20, LayerNorm ``norm``, Conv1D ``mid`` 20 -> 14, Linear ``last`` 14 -> 5."""

    def __init__(self, tmp, make_mlp, make_gpt2, make_llama):
        self.tmp, self.make_mlp, self.make_gpt2, self.make_llama = tmp, make_mlp, make_gpt2, make_llama

    @cached_property
    def plain(self):
        return self.make_mlp()

    @cached_property
    def adapted(self):
        """Adapters ``default`` (first, mid) and ``other`` (first; rank 2), in eval mode."""
        model = get_peft_model(self.make_mlp(), lora("first", "mid"))
        model.add_adapter("other", lora("first", r=2))
        return model.eval()

    @cached_property
    def merged(self):
        self.adapted.merge_adapter()
        return self.adapted

    @cached_property
    def gpt2(self):
        return self.make_gpt2()

    @cached_property
    def llama(self):
        return self.make_llama()

    @cached_property
    def packed(self):
        return quantize_model(self.make_mlp())

    def frozen(self):
        return self.make_mlp().requires_grad_(False)

    def with_adapter(self, *targets, variant=None, **fields):
        """A model of its own with one adapter of this config."""
        return get_peft_model(self.make_mlp(), lora(*(targets or ("first", "mid")), **fields), variant=variant).eval()

    def poisoned(self, value=float("nan")):
        """An adapter with one value that is not finite."""
        model = self.with_adapter()
        with torch.no_grad():
            model.first.lora_B["default"].weight[0, 0] = value
        return model

    def shared(self):
        """``[0]`` and ``[1]`` are one layer."""
        layer = nn.Linear(6, 6)
        return nn.Sequential(layer, layer)

    def folder(self, name="adapter", **fields):
        """An adapter folder for ``plain``: ``first`` and ``mid`` at rank 3."""
        place = self.tmp / name
        save_adapter(inject(self.make_mlp(), lora("first", "mid", **fields)), place)
        return place

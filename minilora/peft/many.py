"""What a model does with its adapters: adding, switching, mixing, merging, taking out. Next file: ``peft/folders.py``."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from minilora.errors import StateError
from minilora.lora.change import LOCK, Change
from minilora.lora.config import LoraConfig
from minilora.lora.inject import build_new, checked, place
from minilora.lora.slots import adapters_of, has_adapters
from minilora.lora.variants.alora import activated
from minilora.many import adapted, batched, combine, hotswap, merging
from minilora.peft.face import in_base_dtype, refuse_extended, restore
from minilora.peft.facts import Facts
from minilora.peft.meta import emptied
from minilora.peft.notes import say_changed_base, say_new

__all__ = ["Many", "as_names"]


def as_names(names: str | Sequence[str]) -> list[str]:
    """One name as a list of one."""
    return [names] if isinstance(names, str) else list(names)


class Many(Facts):
    """The part of ``PeftModel`` that changes the model. Each method is one call of a plain function of ``minilora.many``."""

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig | None = None,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        variant: str | None = None,
    ) -> None:
        """Inject another adapter and keep it aside; ``set_adapter`` makes it active. Raises as ``inject``.

        ``low_cpu_mem_usage`` makes it without values, as for ``get_peft_model``.
        """
        if isinstance(adapter_name, LoraConfig):
            raise StateError("add_adapter(config, name) is transformers' order; here, as in PEFT, the name comes first")
        config = checked(peft_config, variant)  # type: ignore[arg-type]
        values = build_new(self, config, adapter_name, variant)
        say_new(self, config, values)
        say_changed_base([*self.peft_config.values(), config])
        if not autocast_adapter_dtype:
            in_base_dtype(self, values)
        if low_cpu_mem_usage:
            emptied(values)
        place(self, config, adapter_name, values, variant, activate=False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. Raises ``StateError`` for a merged or the only one."""
        adapted.delete_adapter(self, adapter_name)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Make a new adapter from others (``minilora.many.combine``) and keep it aside."""
        combine.add_weighted_adapter(
            self, adapters, weights, adapter_name, combination_type, svd_rank, density, majority_sign_method
        )

    def hotswap_adapter(self, model_id: str | os.PathLike[str], adapter_name: str = "default") -> None:
        """Overwrite an adapter in place with the one in a folder; a compiled model stays compiled."""
        hotswap.hotswap_adapter(self, model_id, adapter_name)

    def batch_adapters(self, adapter_names: Sequence[str]) -> AbstractContextManager[None]:
        """Inside the block row ``i`` of every batch gets adapter ``adapter_names[i]``; "__base__" means none."""
        return batched.batch_adapters(self, adapter_names)

    @staticmethod
    def forward_of(kind: Any) -> Any:
        """A model's own forward, with ``adapter_names`` for a caller who does not call the model itself; its signature stays."""
        own = kind.forward

        @functools.wraps(own)
        def forward(self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
            if adapter_names is None:
                return own(self, *args, **kwargs)
            with batched.batch_adapters(self, adapter_names):
                return own(self, *args, **kwargs)

        return forward

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The forward; with ``adapter_names`` each row of the batch gets its own adapter."""
        if adapter_names is None:
            with activated(self, kwargs.get("input_ids", args[0] if args else None)):
                return super().__call__(*args, **kwargs)
        with batched.batch_adapters(self, adapter_names):
            return super().__call__(*args, **kwargs)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or the sum of several, the active one, and trainable unless ``inference_mode``; unmerge merged ones first."""
        adapters_of(self)  # raises where there are none
        self.base_model.set_adapter(adapter_name, inference_mode)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """The bare base model inside the block, for every thread; ``adapter_names=["__base__"] * rows`` in a call is for that call."""
        return adapted.disabled(self)

    def disable_adapter_layers(self) -> None:
        """The bare model until ``enable_adapter_layers``."""
        self.base_model.disable_adapter_layers()

    def enable_adapter_layers(self) -> None:
        """Undo ``disable_adapter_layers``, and switch layers on that were off."""
        self.base_model.enable_adapter_layers()

    def disable_adapters(self) -> None:
        """transformers' name of ``disable_adapter_layers``."""
        self.disable_adapter_layers()

    def enable_adapters(self) -> None:
        """transformers' name of ``enable_adapter_layers``."""
        self.enable_adapter_layers()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the parameters of these adapters train, or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True, requantize: bool = False
    ) -> merging.MergeReport:
        """Fold adapters (default: the active ones) into the weights; prints and returns how much of the update survives.

        ``safe_merge`` is PEFT's: here every merge is checked before anything changes. ``unmerge_adapter`` is exact.
        """
        adapters = adapters_of(self)
        named = list(adapters.active) if adapter_names is None else as_names(adapter_names)
        new = [name for name in named if name not in adapters.merged]
        if named and not new:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return merging.MergeReport({}, 1.0, "what they are")
        report = merging.merge(self, new, requantize)
        print(report)
        return report

    def unmerge_adapter(self) -> None:
        """Put the original layers back, bit by bit the same."""
        merging.unmerge(self)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
        requantize: bool = False,
    ) -> Any:
        """Fold adapters in for good and return the plain model (the same object, its class restored).

        ``progressbar`` and ``safe_merge`` are PEFT's: merging takes seconds at most and is always checked. Raises ``StateError``, before
        anything has changed, where the class cannot be restored because another library has extended it since.
        """
        refuse_extended(self)
        if not isinstance(progressbar, bool):
            raise StateError(
                f"merge_and_unload({progressbar!r}): wanted adapter_names={progressbar!r} by name, as in PEFT"
            )
        merged = adapters_of(self).merged
        if merged and adapter_names is not None and set(merged) != set(as_names(adapter_names)):
            raise StateError(
                f"adapters {list(merged)} are merged already; unmerge_adapter() before merging {list(adapter_names)}"
            )
        new = None if merged else merging.merged_layers(self, adapter_names, requantize)
        with LOCK, Change() as change:
            if new is not None:
                merging.put_in(change, self, new)
            adapted.take_out(change, self, keep_merged=True)
            restore(change, self)
        if new is not None:
            print(new.report)
        return self

    def unload(self) -> Any:
        """Take the adapters out and return the plain, unchanged base model. Raises ``StateError`` as ``merge_and_unload``."""
        refuse_extended(self)
        with LOCK, Change() as change:
            adapted.take_out(change, self, keep_merged=False)
            restore(change, self)
        return self

    def get_base_model(self) -> Any:
        """The model as an object of its own class, without the methods of this one; all that is in it is the very same."""
        return self.base_model.model if has_adapters(self) else self

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """With activations computed again, the first of them must need a gradient: switch that on, where the base model is not packed."""
        if not any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8)):
            if hasattr(model, "enable_input_require_grads"):
                model.enable_input_require_grads()
            elif hasattr(model, "get_input_embeddings"):
                model.get_input_embeddings().register_forward_hook(
                    lambda _module, _inputs, out: out.requires_grad_(True)
                )
        return model

"""The face that users see: ``get_peft_model`` returns the same model, its class extended in front by ``PeftModel``.

The object stays what it was (``isinstance``, ``generate``, ``Trainer``, ``torch.compile`` go on working) and gains PEFT's methods. Each
is one call of a plain function, which works on any module and can be used without this file. Next file: ``lora/variants/dora.py``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from minilora.errors import StateError
from minilora.linear.fronts import Front, is_on_top, put_in_front, take_from_front
from minilora.linear.layers import compute_dtype
from minilora.lora.adapter import Adapter
from minilora.lora.bare import Bare
from minilora.lora.change import LOCK, Change
from minilora.lora.config import LoraConfig
from minilora.lora.copies import in_given_dtype
from minilora.lora.inject import build_new, inject, place_in
from minilora.lora.slot import own_parameters
from minilora.lora.slots import adapters_of, has_adapters, unwrapped
from minilora.lora.variants.alora import activated
from minilora.many import adapted, batched, combine, hotswap, merging
from minilora.store import load as checkpoint

__all__ = ["PeftModel", "get_peft_model"]


class PeftModel(Front):
    """What a model gains with adapters. It is never built directly: use ``get_peft_model`` or ``PeftModel.from_pretrained``."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``.to``, ``.half`` and the like reach what is aside too: inactive adapters, kept base layers, merged layers."""
        super()._apply(fn, recurse)
        for slot in list(adapters_of(self).slots.values()) if has_adapters(self) else ():
            for value in (slot.base, slot.merged, *slot.kept.values()):
                if isinstance(value, nn.Module):
                    value._apply(fn, recurse)
                elif value is not None:
                    value.data = fn(value.data)
        return self

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Adapter name to its config."""
        return adapters_of(self).configs

    @property
    def active_adapter(self) -> str:
        """The name of the active adapter (the first, if several are active)."""
        return adapters_of(self).active[0]

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, whose updates are added."""
        return list(adapters_of(self).active)

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        expect_sha256: str | None = None,
        allow_other_base: bool = False,
    ) -> Any:
        """Load the adapter folder ``model_id`` into ``model``: active, in eval mode and frozen unless ``is_trainable``.

        ``config`` is used instead of the file's; it, ``expect_sha256`` and ``allow_other_base`` are as for ``minilora.load_adapter``.

        Raises:
            CheckpointError: the folder and the model do not fit, by name; the model is then as it was.
        """
        if not isinstance(model, nn.Module):
            raise StateError(
                f"from_pretrained got a {type(model).__name__} first; wanted the loaded base model, then the adapter's folder"
            )
        _refuse_second(model)
        stored, values, _ = checkpoint.prepare_adapter(
            model,
            model_id,
            adapter_name,
            config=config,
            expect_sha256=expect_sha256,
            allow_other_base=allow_other_base,
        )
        with LOCK, Change() as change:
            place_in(change, model, stored.config, adapter_name, values, stored.variant, trainable=is_trainable)
            _extend(change, model)
            change.train(model, is_trainable)
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write adapters in PEFT's layout: "default" into the folder itself, others into a folder of their name in it.

        ``state_dict`` is what transformers' Trainer passes (the whole model's); the adapter's tensors are read from the model instead.
        """
        if not safe_serialization:
            raise StateError(
                "safe_serialization=False would write a pickle, which runs code when it is read; leave it True"
            )
        if not is_main_process:
            return
        chosen = list(self.peft_config) if selected_adapters is None else _as_names(selected_adapters)
        adapters_of(self).check(chosen)
        for name in chosen:
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            checkpoint.save_adapter(self, folder, name)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """``(trainable, all)`` parameters by PEFT's counting rule."""
        return adapted.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the two counts and their ratio in PEFT's exact words."""
        trainable, every = adapted.count_parameters(self)
        print(
            f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {100 * trainable / every:.4f}"
        )

    def add_adapter(self, adapter_name: str, peft_config: LoraConfig, variant: str | None = None) -> None:
        """Inject another adapter and keep it aside; ``set_adapter`` makes it active. Raises as ``inject``."""
        inject(self, peft_config, adapter_name, variant, activate=False)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        strict: bool = True,
        expect_sha256: str | None = None,
        allow_other_base: bool = False,
    ) -> checkpoint.LoadReport:
        """Load an adapter folder and keep it aside, frozen unless ``is_trainable``. Raises as ``minilora.load_adapter``."""
        allowed: dict[str, Any] = {"expect_sha256": expect_sha256, "allow_other_base": allow_other_base}
        return checkpoint.load_adapter(self, model_id, adapter_name, is_trainable, strict, activate=False, **allowed)

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

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The forward; with ``adapter_names`` each row of the batch gets its own adapter."""
        if adapter_names is None:
            with activated(self, kwargs.get("input_ids", args[0] if args else None)):
                return super().__call__(*args, **kwargs)
        with batched.batch_adapters(self, adapter_names):
            return super().__call__(*args, **kwargs)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make one adapter, or the sum of several, the active and trainable one; merged ones are to be unmerged first."""
        if merged := adapters_of(self).merged:
            raise StateError(
                f"adapters {list(merged)} are merged and would stay in the weights; unmerge_adapter() first"
            )
        adapted.set_adapter(self, adapter_name)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """The bare base model inside the block, for every thread; ``adapter_names=["__base__"] * rows`` in a call is for that call."""
        return adapted.disabled(self)

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True, requantize: bool = False
    ) -> merging.MergeReport:
        """Fold adapters (default: the active ones) into the weights; prints and returns how much of the update survives.

        ``safe_merge`` is PEFT's: here every merge is checked before anything changes. ``unmerge_adapter`` is exact.
        """
        report = merging.merge(self, adapter_names, requantize)
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
        _refuse_extended(self)
        if not isinstance(progressbar, bool):
            raise StateError(
                f"merge_and_unload({progressbar!r}): wanted adapter_names={progressbar!r} by name, as in PEFT"
            )
        merged = adapters_of(self).merged
        if merged and adapter_names is not None and set(merged) != set(_as_names(adapter_names)):
            raise StateError(
                f"adapters {list(merged)} are merged already; unmerge_adapter() before merging {list(adapter_names)}"
            )
        new = None if merged else merging.merged_layers(self, adapter_names, requantize)
        with LOCK, Change() as change:
            if new is not None:
                merging.put_in(change, self, new)
            adapted.take_out(change, self, keep_merged=True)
            _restore(change, self)
        if new is not None:
            print(new.report)
        return self

    def unload(self) -> Any:
        """Take the adapters out and return the plain, unchanged base model. Raises ``StateError`` as ``merge_and_unload``."""
        _refuse_extended(self)
        with LOCK, Change() as change:
            adapted.take_out(change, self, keep_merged=False)
            _restore(change, self)
        return self

    def get_base_model(self) -> Any:
        """The model itself (in PEFT it is another object; here nothing is wrapped)."""
        return self


def get_peft_model(
    model: Any,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    variant: str | None = None,
    autocast_adapter_dtype: bool = True,
) -> Any:
    """Inject a new adapter and give the model PEFT's methods; returns the same object.

    Args:
        model: any ``nn.Module``, usually a transformers model.
        peft_config: never changed.
        adapter_name: the adapter's name.
        variant: name of a registered variant, such as "vera"; None for the one that the config means.
        autocast_adapter_dtype: keep adapters in fp32; False keeps them in the dtype of the layer that each adapts.

    Raises:
        StateError: the model has adapters already (PEFT would silently reset a trained one). TargetError: as ``inject``.
    """
    _refuse_second(model)
    values = build_new(model, peft_config, adapter_name, variant)
    if not autocast_adapter_dtype:
        bare = Bare(model)
        for path, value in values.items():
            if isinstance(value, Adapter):
                for parameter in own_parameters(value):
                    parameter.data = parameter.data.to(compute_dtype(value.innermost))
            elif isinstance(value, nn.Module):
                in_given_dtype(value)
            else:
                value.data = value.data.to(bare.get_parameter(path).dtype)
    with LOCK, Change() as change:
        place_in(change, model, peft_config, adapter_name, values, variant)
        _extend(change, model)
    return model


def _as_names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _refuse_second(model: nn.Module) -> None:
    if has_adapters(model):
        names = list(adapters_of(model).configs)
        raise StateError(f"the model has adapters {names} already; unload() or merge_and_unload() them first")


class _Generates(PeftModel):
    """For a model that has ``generate``; one without it must not seem to have it."""

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own ``generate``; with ``adapter_names`` each prompt gets its own adapter."""
        prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        with activated(self, prompt) if adapter_names is None else batched.batch_adapters(self, adapter_names):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def _extend(change: Change, model: nn.Module) -> None:
    """Put ``PeftModel`` in front of the object's class, under the old name: transformers looks classes up by name."""
    inner = unwrapped(model)
    if not isinstance(inner, PeftModel):  # its adapters may have been taken out by the plain function
        change.keep(inner, "__class__")
        put_in_front(inner, _Generates if hasattr(inner, "generate") else PeftModel)


def _refuse_extended(model: nn.Module) -> None:
    """Before anything is taken out: the class must be the one that ``_extend`` made, or its past cannot be told from another's."""
    if not is_on_top(PeftModel, model):
        raise StateError(
            f"{type(model).__name__}: its class was extended after get_peft_model (FSDP2 does so), so it cannot be restored; unload "
            "before that, or take the adapters out and leave the class with minilora.unload(model)"
        )


def _restore(change: Change, model: nn.Module) -> None:
    change.keep(model, "__class__")
    take_from_front(model, PeftModel)

"""The face that users see: ``get_peft_model`` returns the same model, its class extended in front by ``PeftModel``.

The object stays what it was (``isinstance``, ``generate``, ``Trainer``, ``torch.compile`` go on working) and gains PEFT's methods. Each
is one call of a plain function, which works on any module and can be used without this file. Next file: ``lora/variants/dora.py``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from minilora.errors import StateError
from minilora.lora.change import LOCK, Change
from minilora.lora.config import LoraConfig
from minilora.lora.inject import build_new, checked, place, place_in
from minilora.lora.slots import adapters_of, has_adapters
from minilora.lora.variants.alora import activated
from minilora.many import adapted, batched, combine, hotswap, merging
from minilora.peft.card import write_card
from minilora.peft.face import extend, in_base_dtype, refuse_extended, refuse_second, restore
from minilora.peft.faces import give_faces
from minilora.peft.hub import folder_of, push
from minilora.peft.shape import Shape
from minilora.peft.status import get_layer_status, get_model_status
from minilora.store import load as checkpoint

__all__ = [
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "get_peft_model",
]


class PeftModel(Shape):
    """What a model gains with adapters.

    ``PeftModel(model, config, adapter_name)`` is ``get_peft_model`` under another name: it returns ``model`` itself.
    """

    _hf_peft_config_loaded = True  # transformers asks this before it trains a model of packed weights

    def __new__(cls, model: Any = None, peft_config: Any = None, adapter_name: str = "default", **fields: Any) -> Any:
        if model is None:  # a copy or a pickle, which is filled later
            return super().__new__(cls)
        return get_peft_model(model, peft_config, adapter_name, face=cls, **fields)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not (args and args[0] is self):  # the model is what it was before __new__ returned it
            super().__init__(*args, **kwargs)

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
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        expect_sha256: str | None = None,
        allow_other_base: bool = False,
        **where: Any,
    ) -> Any:
        """Load the adapter folder ``model_id`` into ``model``: active, in eval mode and frozen unless ``is_trainable``.

        Args:
            model_id: a folder, or an id on the Hugging Face Hub (``revision``, ``subfolder``, ``token`` and the like say which).
            config: is used instead of the file's.
            autocast_adapter_dtype: keep adapters in fp32; False keeps them in the dtype of the layer that each adapts.
            ephemeral_gpu_offload, low_cpu_mem_usage, torch_device: PEFT's; adapters are made on the device of their layers.
            key_mapping: regular expressions over the file's tensor names, and what each is replaced by.
            expect_sha256, allow_other_base: as for ``minilora.load_adapter``.

        Raises:
            CheckpointError: the folder and the model do not fit, by name; the model is then as it was.
        """
        if not isinstance(model, nn.Module):
            raise StateError(
                f"from_pretrained got a {type(model).__name__} first; wanted the loaded base model, then the adapter's folder"
            )
        refuse_second(model)
        stored, values, _ = checkpoint.prepare_adapter(
            model,
            folder_of(model_id, where),
            adapter_name,
            config=None if config is None else checked(config),
            expect_sha256=expect_sha256,
            allow_other_base=allow_other_base,
            key_mapping=key_mapping,
        )
        own = dataclasses.replace(stored.config, inference_mode=not is_trainable)
        if not autocast_adapter_dtype:
            in_base_dtype(model, values)
        with LOCK, Change() as change:
            place_in(change, model, own, adapter_name, values, stored.variant, trainable=is_trainable)
            give_faces(change, model)
            extend(change, model, _face(cls, own))
            change.train(model, is_trainable)
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        state_dict: dict | None = None,
        **_: Any,
    ) -> None:
        """Write adapters in PEFT's layout: "default" into the folder itself, others into a folder of their name in it; and a model card.

        ``state_dict`` is what transformers' Trainer passes (the whole model's); the adapter's tensors are read from the model instead.
        Of the other arguments of transformers' ``save_pretrained`` none concerns an adapter.
        """
        if not isinstance(safe_serialization, bool):
            raise StateError(
                f"safe_serialization={safe_serialization!r}: wanted selected_adapters= by name, as in PEFT"
            )
        if not safe_serialization:
            raise StateError(
                "safe_serialization=False would write a pickle, which runs code when it is read; leave it True"
            )
        if path_initial_model_for_weight_conversion is not None:
            raise StateError(
                "path_initial_model_for_weight_conversion: minilora does not write the difference to a start value; save without it, or "
                "merge_and_unload"
            )
        if not is_main_process:
            return
        chosen = list(self.peft_config) if selected_adapters is None else _as_names(selected_adapters)
        adapters_of(self).check(chosen)
        for name in chosen:
            folder = save_directory if name == "default" else os.path.join(save_directory, name)
            checkpoint.save_adapter(self, folder, name, save_embedding_layers)
        write_card(self, save_directory)

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write ``README.md``: the base model, the libraries, and tags by which a hub finds the adapter."""
        write_card(self, output_dir)

    def push_to_hub(self, repo_id: str, **fields: Any) -> Any:
        """Save the adapters and upload them to the Hugging Face Hub (``huggingface_hub``); returns what the upload returns."""
        return push(self, repo_id, **fields)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """``(trainable, all)`` parameters by PEFT's counting rule."""
        return adapted.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the two counts and their ratio in PEFT's exact words."""
        trainable, every = adapted.count_parameters(self)
        print(
            f"trainable params: {trainable:,d} || all params: {every:,d} || trainable%: {100 * trainable / every:.4f}"
        )

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        variant: str | None = None,
    ) -> None:
        """Inject another adapter and keep it aside; ``set_adapter`` makes it active. Raises as ``inject``."""
        config = checked(peft_config)
        values = build_new(self, config, adapter_name, variant)
        if not autocast_adapter_dtype:
            in_base_dtype(self, values)
        place(self, config, adapter_name, values, variant, activate=False)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool = True,
        expect_sha256: str | None = None,
        allow_other_base: bool = False,
        **where: Any,
    ) -> checkpoint.LoadReport:
        """Load an adapter and keep it aside, frozen unless ``is_trainable``; into the one of that name, if there is one (so a run resumes).

        Arguments as of ``from_pretrained``; raises as it.
        """
        if adapter_name in self.peft_config:
            report = checkpoint.restore_adapter(
                self, folder_of(model_id, where), adapter_name, strict, expect_sha256, allow_other_base, key_mapping
            )
            self.set_requires_grad(adapter_name, is_trainable)
            return report
        stored, values, report = checkpoint.prepare_adapter(
            self,
            folder_of(model_id, where),
            adapter_name,
            strict,
            expect_sha256=expect_sha256,
            allow_other_base=allow_other_base,
            key_mapping=key_mapping,
        )
        if not autocast_adapter_dtype:
            in_base_dtype(self, values)
        own = dataclasses.replace(stored.config, inference_mode=not is_trainable)
        place(self, own, adapter_name, values, stored.variant, activate=False, trainable=is_trainable)
        return report

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

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or the sum of several, the active one, and trainable unless ``inference_mode``; unmerge merged ones first."""
        if merged := adapters_of(self).merged:
            raise StateError(
                f"adapters {list(merged)} are merged and would stay in the weights; unmerge_adapter() first"
            )
        adapted.set_adapter(self, adapter_name)
        if inference_mode:
            self.set_requires_grad(adapter_name, False)

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
        refuse_extended(self)
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
        """The model itself (in PEFT it is another object; here nothing is wrapped)."""
        return self

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let the parameters of these adapters train, or not."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def get_layer_status(self) -> Any:
        """What each adapted layer holds; as ``minilora.peft.get_layer_status``."""
        return get_layer_status(self)

    def get_model_status(self) -> Any:
        """What the model holds; as ``minilora.peft.get_model_status``."""
        return get_model_status(self)

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

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update can be written as a plain LoRA."""
        return self.base_model.supports_lora_conversion(adapter_name)

    @property
    def active_peft_config(self) -> LoraConfig:
        """The config of the active adapter."""
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> Any:
        """``PeftType.LORA``."""
        return self.active_peft_config.peft_type

    @property
    def prefix(self) -> str:
        """What the names of trained parameters begin with."""
        return "lora_"

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the layers that have an adapter."""
        return self.base_model.targeted_module_names

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Bare parameters that have an adapter: none."""
        return self.base_model.targeted_parameter_names

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that train whole, of all adapters."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def base_model_torch_dtype(self) -> Any:
        """The model's dtype."""
        return getattr(self, "dtype", None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter takes part in a forward."""
        return not adapters_of(self).is_bare


class PeftModelForCausalLM(PeftModel):
    """A ``PeftModel`` whose config has ``task_type="CAUSAL_LM"``."""


class PeftModelForSeq2SeqLM(PeftModel):
    """A ``PeftModel`` whose config has ``task_type="SEQ_2_SEQ_LM"``."""


class PeftModelForSequenceClassification(PeftModel):
    """A ``PeftModel`` whose config has ``task_type="SEQ_CLS"``."""


class PeftModelForTokenClassification(PeftModel):
    """A ``PeftModel`` whose config has ``task_type="TOKEN_CLS"``."""


class PeftModelForQuestionAnswering(PeftModel):
    """A ``PeftModel`` whose config has ``task_type="QUESTION_ANS"``."""


class PeftModelForFeatureExtraction(PeftModel):
    """A ``PeftModel`` whose config has ``task_type="FEATURE_EXTRACTION"``."""


class PeftMixedModel(PeftModel):
    """PEFT's model for several methods at once; minilora has one method, so no model is one."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def _face(face: type[PeftModel], config: LoraConfig) -> type[PeftModel]:
    """The class by the config's task, where none was asked for."""
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type), PeftModel) if face is PeftModel else face


def get_peft_model(
    model: Any,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    variant: str | None = None,
    face: type[PeftModel] = PeftModel,
) -> Any:
    """Inject a new adapter and give the model PEFT's methods; returns the same object.

    Args:
        model: any ``nn.Module``, usually a transformers model.
        peft_config: never changed.
        adapter_name: the adapter's name.
        mixed: PEFT's mixture of several methods, of which minilora has one: False.
        autocast_adapter_dtype: keep adapters in fp32; False keeps them in the dtype of the layer that each adapts.
        revision: of the base model; goes into the saved config.
        low_cpu_mem_usage: PEFT's; adapters are made on the device of their layers.
        variant: name of a registered variant, such as "vera"; None for the one that the config means.
        face: the class whose methods the model gains; by default the one of the config's task.

    Raises:
        StateError: the model has adapters already (PEFT would silently reset a trained one). TargetError: as ``inject``.
    """
    if mixed:
        raise StateError("mixed=True: minilora has one method, LoRA; several adapters of it need no mixed model")
    refuse_second(model)
    config = checked(peft_config if revision is None else dataclasses.replace(peft_config, revision=revision))
    values = build_new(model, config, adapter_name, variant)
    if not autocast_adapter_dtype:
        in_base_dtype(model, values)
    with LOCK, Change() as change:
        place_in(change, model, config, adapter_name, values, variant)
        give_faces(change, model)
        extend(change, model, _face(face, config))
    return model


def _as_names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)

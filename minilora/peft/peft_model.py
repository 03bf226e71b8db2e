"""The face that users see: ``get_peft_model`` returns the same model, its class extended in front by ``PeftModel``.

The object stays what it was (``isinstance``, ``generate``, ``Trainer``, ``torch.compile`` go on working) and gains PEFT's methods. Each
is one call of a plain function, which works on any module and can be used without this file. Next file: ``lora/variants/dora.py``.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from torch import nn

from minilora.errors import StateError, warn
from minilora.lora.change import LOCK, Change
from minilora.lora.config import LoraConfig
from minilora.lora.inject import build_new, checked, place_in
from minilora.lora.slots import adapters_of, has_adapters
from minilora.peft.face import extend, in_base_dtype, refuse_second
from minilora.peft.faces import give_faces
from minilora.peft.folders import Folders
from minilora.peft.hub import folder_of, name_of
from minilora.peft.meta import emptied
from minilora.peft.notes import say_left_out, say_new, say_renamed
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


class PeftModel(Folders):
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
        ignore_mismatched_sizes: bool = False,
        **where: Any,
    ) -> Any:
        """Load the adapter folder ``model_id`` into ``model``: active, in eval mode and frozen unless ``is_trainable``.

        A model that has adapters keeps them: the folder goes beside them, or into the one of its name, with a warning.

        Args:
            model_id: a folder, or an id on the Hugging Face Hub (``revision``, ``subfolder``, ``token`` and the like say which).
            config: is used instead of the file's.
            autocast_adapter_dtype: keep adapters in fp32; False keeps them in the dtype of the layer that each adapts.
            ephemeral_gpu_offload, low_cpu_mem_usage, torch_device: PEFT's; adapters are made on the device of their layers.
            key_mapping: regular expressions over the file's tensor names, and what each is replaced by; the model's own
                ``_checkpoint_conversion_mapping`` (transformers' names of another version) by default.
            ignore_mismatched_sizes: leave out tensors of another shape, with a warning.
            expect_sha256, allow_other_base: as for ``minilora.load_adapter``.

        Raises:
            CheckpointError: the folder and the model do not fit, by name; the model is then as it was.
        """
        if not isinstance(model, nn.Module):
            raise StateError(
                f"from_pretrained got a {type(model).__name__} first; wanted the loaded base model, then the adapter's folder"
            )
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        if has_adapters(model):
            where |= {"key_mapping": key_mapping, "ignore_mismatched_sizes": ignore_mismatched_sizes}
            where |= {"expect_sha256": expect_sha256, "allow_other_base": allow_other_base}
            return _beside(cls, model, model_id, adapter_name, is_trainable, config, autocast_adapter_dtype, where)
        stored, values, report = checkpoint.prepare_adapter(
            model,
            folder_of(model_id, where),
            adapter_name,
            config=None if config is None else checked(config),
            expect_sha256=expect_sha256,
            allow_other_base=allow_other_base,
            key_mapping=key_mapping,
            ignore_mismatched_sizes=ignore_mismatched_sizes,
        )
        say_left_out(model, report if ignore_mismatched_sizes else None)
        own = dataclasses.replace(stored.config, inference_mode=not is_trainable)
        if not autocast_adapter_dtype:
            in_base_dtype(model, values)
        with LOCK, Change() as change:
            place_in(change, model, own, adapter_name, values, stored.variant, trainable=is_trainable)
            give_faces(change, model)
            extend(change, model, _face(cls, own))
            change.train(model, is_trainable)
        return model


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


def _beside(
    face: type[PeftModel],
    model: Any,
    model_id: str | os.PathLike[str],
    adapter_name: str,
    is_trainable: bool,
    config: LoraConfig | None,
    autocast_adapter_dtype: bool,
    options: dict[str, Any],
) -> Any:
    """``from_pretrained`` on a model that has adapters. Raises ``StateError`` for a ``config``, which is for a first adapter."""
    if config is not None:
        raise StateError(
            f"the model has adapters {list(adapters_of(model).configs)} already, and a folder beside them brings its own; leave out config="
        )
    warn(
        "You are trying to modify a model with PEFT for a second time. Its adapters stay; if you want to reload the model with a different "
        "config, make sure to call `.unload()` before"
    )
    with LOCK, Change() as change:
        give_faces(change, model)
        extend(change, model, _face(face, next(iter(adapters_of(model).configs.values()))))
        model.load_adapter(
            model_id, adapter_name, is_trainable, autocast_adapter_dtype=autocast_adapter_dtype, **options
        )
    model.set_adapter(adapter_name, inference_mode=not is_trainable)
    return model.train(is_trainable)


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
        low_cpu_mem_usage: make the adapter without values, on the meta device; ``set_peft_model_state_dict`` brings them.
        variant: name of a registered variant, such as "vera"; None for the one that the config means.
        face: the class whose methods the model gains; by default the one of the config's task.

    Raises:
        StateError: the model has adapters already (PEFT would silently reset a trained one). TargetError: as ``inject``.
    """
    if mixed:
        raise StateError("mixed=True: minilora has one method, LoRA; several adapters of it need no mixed model")
    refuse_second(model)
    given, name = checked(peft_config, variant), name_of(model)
    say_renamed(given, name)
    config = dataclasses.replace(given, base_model_name_or_path=name, revision=revision or given.revision).for_use()
    values = build_new(model, config, adapter_name, variant)
    say_new(model, config, values)
    if not autocast_adapter_dtype:
        in_base_dtype(model, values)
    if low_cpu_mem_usage:
        emptied(values)
    with LOCK, Change() as change:
        place_in(change, model, config, adapter_name, values, variant)
        give_faces(change, model)
        extend(change, model, _face(face, config))
    return model

"""An adapter folder as a whole model: the base that its config names is loaded, and the adapter into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch

from minilora.errors import CheckpointError, ConfigError, MissingPackageError, StateError
from minilora.lora.config import LoraConfig
from minilora.peft.hub import folder_of
from minilora.peft.peft_model import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from minilora.store.adapter_files import read_config

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]

_HUB = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only", "proxies")


class AutoPeftModel:
    """PEFT's name for loading by adapter folder alone; one class for each task, and this one for a config without a task."""

    loader: ClassVar[str] = "AutoModel"
    face: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            f"{type(self).__name__} makes models of other classes; call {type(self).__name__}.from_pretrained(folder)"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model named in the folder's config, with the adapter active.

        Args:
            revision, subfolder, token and the like: of the adapter on the Hub.
            kwargs: for transformers' loader of the base: ``dtype``, ``device_map``, ``quantization_config``, ...

        Where a tokenizer is saved beside the adapter and is larger than the base's vocabulary, the base's embeddings are resized to it.

        Raises:
            ConfigError: the config names no base model, or another task. CheckpointError: the base cannot be loaded, or the adapter does
                not fit it.
        """
        where = {name: kwargs.pop(name) for name in _HUB if name in kwargs} | (
            {"revision": revision} if revision else {}
        )
        allow = {name: kwargs.pop(name) for name in ("allow_other_base", "expect_sha256") if name in kwargs}
        folder = folder_of(pretrained_model_name_or_path, where)
        stored = read_config(folder)
        if not stored.base_model_name_or_path:
            raise ConfigError(
                f"{folder}: its config names no base_model_name_or_path; load the model and use PeftModel.from_pretrained"
            )
        cls._check_task(folder, stored)
        base = cls._base(stored, kwargs)
        _grow(base, folder)
        return cls.face.from_pretrained(base, folder, adapter_name, is_trainable, config, **allow)

    @classmethod
    def _check_task(cls, folder: Path, stored: LoraConfig) -> None:
        task = stored.task_type
        wanted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(task), PeftModel)
        if task is not None and wanted is not cls.face:
            raise StateError(
                f"{folder}: its task_type is {task!r}; load it with Auto{wanted.__name__}, not {cls.__name__}"
            )

    @classmethod
    def _base(cls, stored: LoraConfig, kwargs: dict[str, Any]) -> Any:
        try:
            import transformers
        except ImportError:
            raise MissingPackageError(
                "loading a base model by its name needs transformers; pip install minilora[hf]"
            ) from None
        name = stored.base_model_name_or_path
        if stored.revision:
            kwargs = {"revision": stored.revision} | kwargs
        try:
            # A pickle can run code, so weights come from safetensors alone, and no code of a folder runs unless it is asked for.
            return getattr(transformers, cls.loader).from_pretrained(
                name, **{"use_safetensors": True, "trust_remote_code": False} | kwargs
            )
        except (OSError, ValueError) as error:
            said = str(error).strip().split("\n")[0]
            raise CheckpointError(
                f"the base model {name!r} cannot be loaded ({said}); load it yourself and use PeftModel.from_pretrained"
            ) from None


def _grow(model: Any, folder: Path) -> None:
    """Resize the embeddings to a tokenizer that was saved with the adapter, where that has more tokens."""
    if not (folder / "tokenizer_config.json").exists() or not hasattr(model, "get_input_embeddings"):
        return
    import transformers

    tokens = len(transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    if tokens > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(tokens)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For ``task_type="CAUSAL_LM"``."""

    loader, face = "AutoModelForCausalLM", PeftModelForCausalLM

    @classmethod
    def _base(cls, stored: LoraConfig, kwargs: dict[str, Any]) -> Any:
        """As minilora loads a model, a packed folder too, where nothing is asked that only transformers knows."""
        if kwargs.keys() <= {"dtype", "trust_remote_code"} and not stored.revision:
            from minilora.hf.load import load_model

            trusted = kwargs.get("trust_remote_code", False)
            return load_model(str(stored.base_model_name_or_path), kwargs.get("dtype", torch.float32), trusted)
        return super()._base(stored, kwargs)


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For ``task_type="SEQ_2_SEQ_LM"``."""

    loader, face = "AutoModelForSeq2SeqLM", PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For ``task_type="SEQ_CLS"``."""

    loader, face = "AutoModelForSequenceClassification", PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For ``task_type="TOKEN_CLS"``."""

    loader, face = "AutoModelForTokenClassification", PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For ``task_type="QUESTION_ANS"``."""

    loader, face = "AutoModelForQuestionAnswering", PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For ``task_type="FEATURE_EXTRACTION"``."""

    loader, face = "AutoModel", PeftModelForFeatureExtraction

"""The rest of PEFT's names, so that code written for it runs with its import changed. Each is one line over what minilora has.

``PeftConfig`` is ``LoraConfig`` (there is one kind of config here), and the model classes by task are all ``PeftModel``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from minilora.lora.config import LoraConfig
from minilora.lora.inject import inject
from minilora.peft_model import PeftModel
from minilora.store.load import LoadReport, adapter_state_dict, fill_adapter

__all__ = [
    "PeftConfig",
    "PeftModelForCausalLM",
    "PeftModelForSequenceClassification",
    "TaskType",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_peft_model_state_dict",
]

PeftConfig = LoraConfig
PeftModelForCausalLM = PeftModelForSequenceClassification = PeftModel


class TaskType(enum.StrEnum):
    """What the model is for; decides which head is trained whole."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def inject_adapter_in_model(peft_config: LoraConfig, model: Any, adapter_name: str = "default") -> Any:
    """``inject`` with PEFT's order of arguments: the model gains adapters and no methods."""
    return inject(model, peft_config, adapter_name)


def get_peft_model_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The adapter's tensors under the names that its file has."""
    return adapter_state_dict(model, adapter_name)


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default", strict: bool = True
) -> LoadReport:
    """Copy tensors into an adapter that the model has; what does not fit raises ``CheckpointError`` unless ``strict=False``."""
    return fill_adapter(model, peft_model_state_dict, adapter_name, strict)

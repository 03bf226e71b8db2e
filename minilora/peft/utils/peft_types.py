"""``PeftType`` and ``TaskType``."""

from __future__ import annotations

import enum

from minilora.lora.config_file import PeftType

__all__ = ["PeftType", "TaskType"]


class TaskType(enum.StrEnum):
    """What the model is for; decides which head is trained whole."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

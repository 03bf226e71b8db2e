# What __init__.py imports lazily, for mypy and editors; tests/peft/test_names.py holds the two equal.
from minilora.peft.utils.error import NoMatchingPeftModuleError as NoMatchingPeftModuleError
from minilora.peft.utils.error import PeftError as PeftError
from minilora.peft.utils.other import CONFIG_NAME as CONFIG_NAME
from minilora.peft.utils.other import INCLUDE_LINEAR_LAYERS_SHORTHAND as INCLUDE_LINEAR_LAYERS_SHORTHAND
from minilora.peft.utils.other import SAFETENSORS_WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from minilora.peft.utils.other import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from minilora.peft.utils.other import WEIGHTS_NAME as WEIGHTS_NAME
from minilora.peft.utils.other import infer_device as infer_device
from minilora.peft.utils.peft_types import PeftType as PeftType
from minilora.peft.utils.peft_types import TaskType as TaskType
from minilora.peft.utils.save_and_load import get_base_model_state_dict as get_base_model_state_dict
from minilora.peft.utils.save_and_load import get_peft_model_state_dict as get_peft_model_state_dict
from minilora.peft.utils.save_and_load import load_peft_weights as load_peft_weights
from minilora.peft.utils.save_and_load import set_base_model_state_dict as set_base_model_state_dict
from minilora.peft.utils.save_and_load import set_peft_model_state_dict as set_peft_model_state_dict
from minilora.peft.utils.warning import PeftWarning as PeftWarning
from minilora.peft.wrappers import AuxiliaryTrainingWrapper as AuxiliaryTrainingWrapper
from minilora.peft.wrappers import ModulesToSaveWrapper as ModulesToSaveWrapper
from minilora.peft.wrappers import TrainableTokensWrapper as TrainableTokensWrapper
from minilora.qlora.kbit import prepare_model_for_kbit_training as prepare_model_for_kbit_training

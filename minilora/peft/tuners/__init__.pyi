# What __init__.py imports lazily, for mypy and editors; tests/test_public_names.py holds the two equal.
from minilora.lora.config import LoraConfig as LoraConfig
from minilora.lora.starts import EvaConfig as EvaConfig
from minilora.lora.starts import LoftQConfig as LoftQConfig
from minilora.lora.starts import LoraGAConfig as LoraGAConfig
from minilora.lora.vera_config import VeraConfig as VeraConfig
from minilora.peft.lora_model import LoraModel as LoraModel

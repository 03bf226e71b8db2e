# What __init__.py imports lazily, for mypy and editors; tests/peft/test_names.py holds the two equal.
from minilora.lora.config import LoraConfig as LoraConfig
from minilora.peft.tuners.lora.model import LoraModel as LoraModel

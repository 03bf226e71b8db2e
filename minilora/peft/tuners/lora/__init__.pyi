# What __init__.py imports lazily, for mypy and editors; tests/peft/test_names.py holds the two equal.
from minilora.lora.config import LoraConfig as LoraConfig
from minilora.peft.tuners.lora.layer import Conv1d as Conv1d
from minilora.peft.tuners.lora.layer import Conv2d as Conv2d
from minilora.peft.tuners.lora.layer import Conv3d as Conv3d
from minilora.peft.tuners.lora.layer import Embedding as Embedding
from minilora.peft.tuners.lora.layer import Linear as Linear
from minilora.peft.tuners.lora.layer import LoraLayer as LoraLayer
from minilora.peft.tuners.lora.layer import MultiheadAttention as MultiheadAttention
from minilora.peft.tuners.lora.model import LoraModel as LoraModel

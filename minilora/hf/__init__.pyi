# What __init__.py imports lazily, for mypy and editors; tests/test_public_names.py holds the two equal.
from minilora.hf.began import Reference as Reference
from minilora.hf.began import reference as reference
from minilora.hf.generate import answers as answers
from minilora.hf.load import load_model as load_model
from minilora.hf.load import load_tokenizer as load_tokenizer
from minilora.hf.load import resolve as resolve
from minilora.hf.quantizer import NF4Config as NF4Config
from minilora.hf.trainer import LoraTrainer as LoraTrainer
from minilora.hf.trainer import LoraTrainerMixin as LoraTrainerMixin

__all__: list[str]

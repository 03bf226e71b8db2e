# What __init__.py imports lazily, for mypy and editors; tests/test_public_names.py holds the two equal.
from minilora.lab.byte_model.model import byte_model as byte_model
from minilora.lab.byte_model.texts import code as code
from minilora.lab.byte_model.texts import decode as decode
from minilora.lab.byte_model.texts import docs as docs
from minilora.lab.byte_model.texts import encode as encode
from minilora.lab.byte_model.texts import facts as facts
from minilora.lab.byte_model.texts import line_examples as line_examples
from minilora.lab.byte_model.texts import sums as sums
from minilora.lab.byte_model.texts import text_examples as text_examples

__all__: list[str]

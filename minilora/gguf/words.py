"""The words that the command line has for what is written: alone in a file, so that they can be listed without torch.

Next file: ``gguf/names.py``.
"""

FACTORS = ("f32", "f16")  # numbers of a GGUF LoRA
WEIGHTS = ("q8_0", "f16", "f32")  # of a merged file

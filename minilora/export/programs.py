"""The programs that an adapter can be exported for: their names alone, so that the command line can list them without torch.

Next file: ``export/folders.py``.
"""

TARGETS = ("vllm", "llama.cpp", "mlx")

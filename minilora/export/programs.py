"""The programs that an adapter can be exported for: their names alone, so that the command line can list them without torch.

Next file: ``export/folders.py``.
"""

TARGETS = ("vllm", "llama.cpp", "mlx")
# With --base: a GGUF LoRA for the file that is served, and for Ollama the Modelfile beside it.
WITH_BASE = ("llama.cpp", "ollama")
PROGRAMS = (*TARGETS, "ollama")

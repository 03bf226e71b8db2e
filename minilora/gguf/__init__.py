"""GGUF files, as llama.cpp serves them: opening one safely, and what its tensors are called."""

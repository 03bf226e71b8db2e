"""Weights as a GGUF file holds them: blocks of integers with their scales beside them, decoded as llama.cpp decodes them.

Read ``formats.py`` first, then ``blocks32.py``; ``blocks256.py`` is the same for the formats that llama.cpp calls k-quants.
"""

"""Adapters for other programs, and which program takes what. Read ``folders.py`` first."""

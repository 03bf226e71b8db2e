"""A right file for each lesson, which ``minilora learn solution`` shows. There are others."""

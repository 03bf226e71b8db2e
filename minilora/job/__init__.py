"""A fine-tuning job from the data to the report, and what its run folder keeps: what ``minilora train`` and ``minilora demo`` do."""

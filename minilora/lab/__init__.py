"""Small experiments on LoRA that start at once: many fine-tunings in one pass, and claims with a verdict."""

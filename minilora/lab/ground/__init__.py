"""What a claim is, and what it is tried on: the small model, its texts, and runs that are tuned, and done once. Read ``claim.py`` first."""

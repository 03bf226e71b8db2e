"""Many fine-tunings in one pass, and claims with a verdict; ``measures`` looks at what an adapter has become."""

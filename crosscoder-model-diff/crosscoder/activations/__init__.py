"""Activation sets: reading them off the models, on disk, and as shuffled batches."""

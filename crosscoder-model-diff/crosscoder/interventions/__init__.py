"""Puts latents into a model, or takes them out."""

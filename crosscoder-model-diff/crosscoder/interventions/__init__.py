"""Puts latents into a model, or takes them out: `steering.steered` as it generates, `causal_report` with controls."""

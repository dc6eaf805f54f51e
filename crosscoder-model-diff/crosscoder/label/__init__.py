"""Names for latents: a model describes each from its examples, and the description is scored on others."""

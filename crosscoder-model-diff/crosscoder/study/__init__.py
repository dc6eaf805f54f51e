"""Does a diff find what fine-tuning added: planted data, patches into the models."""

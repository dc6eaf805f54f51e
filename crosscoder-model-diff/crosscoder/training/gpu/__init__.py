"""The training step on a GPU, written by hand."""

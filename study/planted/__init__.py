"""Dictionaries on activations made from known directions."""

"""BatchTopK crosscoders on the activations of two models: collecting, training, reading."""

"""The crosscoder and the other methods: shapes, forward, selection, what each adds to the loss."""

"""A sitting at a GPU: `python -m benchmarks.gpu`, and the model of what it should find."""

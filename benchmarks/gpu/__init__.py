"""Measurements in a session on a GPU: `python -m benchmarks.gpu`, and a model of the expected
costs.
"""

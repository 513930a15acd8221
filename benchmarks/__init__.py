"""Measures time and memory of the kernel and its peers: `python -m benchmarks --help`."""

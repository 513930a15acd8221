"""Time and memory of the kernel beside its peers: `python -m benchmarks --help`."""

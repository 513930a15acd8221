"""Evaluate a model on a benchmark: its problems, the completions, the rates and intervals.

`subject` loads the evaluated model. `benchmarks`, `answers` and `result` need no torch.
"""

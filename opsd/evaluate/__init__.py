"""How well a model answers a benchmark: its problems, the completions, the rates and intervals.

`subject` loads the model that is measured. `benchmarks`, `answers` and `result` need no torch.
"""

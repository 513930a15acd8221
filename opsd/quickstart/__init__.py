"""`opsd quickstart`: a model learns from itself on a laptop, beside GRPO and SFT.

`run.quickstart` is the whole course; `smollm2_recipe` and `tiny_recipe` are the two that there are.
"""

GB = 1_000_000_000
MEMORY, TINY_MEMORY = 5 * GB, 2 * GB
"""What the quickstart needs at its peak, and with `--tiny`."""
DISK = 4 * GB
"""For the model, its saved versions and a run's checkpoints."""

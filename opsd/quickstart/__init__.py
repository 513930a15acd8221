"""`opsd quickstart`: train a small model on a laptop by OPSD, and by GRPO and SFT to compare.

`run.quickstart` runs it all, by one of two recipes: `smollm2_recipe` or `tiny_recipe`.
"""

GB = 1_000_000_000
MEMORY, TINY_MEMORY = 5 * GB, 2 * GB
"""Bytes of memory that the quickstart needs at its peak, without and with `--tiny`."""
DISK = 4 * GB
"""Bytes of disk for the model, its saved versions and a run's checkpoints."""

"""`opsd quickstart`: a model learns from itself on a laptop, beside GRPO and SFT.

`run.quickstart` is its course; `tiny_recipe` and `smollm2_recipe` say what is trained on what.
"""

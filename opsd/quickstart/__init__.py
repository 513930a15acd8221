"""`opsd quickstart`: a model learns from itself on a laptop, beside GRPO and SFT."""

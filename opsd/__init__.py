"""On-policy self-distillation: a language model learns from itself, shown the solution."""

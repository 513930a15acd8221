"""Loading a model, its head, its adapters, its copies, and who teaches.

Import from the module that has the name: `load`, `head`, `lora`, `copies`, `teacher`.
"""

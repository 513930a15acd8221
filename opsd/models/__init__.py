"""Loads a model with its head and adapters, copies it, and decides which weights the teacher has.

Import each name from its module: `load`, `head`, `lora`, `copies`, `teacher`.
"""

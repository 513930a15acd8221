"""A run's directory: its files, its lock, its log, and reading all of it back.

Import from `directory`, `log` and `read`.
"""

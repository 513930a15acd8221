"""A run's directory: its files, the lock that one run holds, its log, and reading it all back.

Import from `directory`, `log` and `read`.
"""

"""A run's configuration: its sections, which values may be combined, and reading it from YAML.

Import `Config` from `config`, `load_config` and `parse_config` from `load`. Nothing here imports
torch, so a bad file is refused within a second.
"""

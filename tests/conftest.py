"""Shared by all tests: what they need of the installation, said once."""

import os

# Before anything imports tokenizers: a fork after its threads started prints a page of advice.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

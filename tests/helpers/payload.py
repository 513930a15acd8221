"""A pickle that would run code if it were loaded."""

import os
from pathlib import Path


class Payload:
    """When its pickle is loaded, it creates a directory."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)

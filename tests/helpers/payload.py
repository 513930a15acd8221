"""A pickle that would run code if it were loaded."""

import os
from pathlib import Path


class Payload:
    """Pickled, it makes a file where it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)

"""Environment variables that libraries read, set for the `opsd` command and `import opsd` alike."""

import os


def set_environment() -> None:
    """Set the variables that are not set yet. Call it before torch is imported where possible."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns after a fork
    # Waiting threads spin for microseconds, then sleep. By libgomp's default, milliseconds, a step
    # of the tiny model took 30 times as long on shared cores; sleeping at once makes it 1.5 times
    # as long on an idle machine. libgomp reads this when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Packed streams differ in length at each step, and oneDNN caches a product for each length:
    # 1024 by default, 50 MB a step. It reads this at the first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "48")

"""Settings that libraries read from the environment, for the command and for Python alike."""

import os


def set_environment() -> None:
    """Set what nobody has set; to be called before torch is imported, as far as that may be."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns after a fork otherwise
    # Waiting threads spin for some microseconds, then sleep. libgomp's default spins for
    # milliseconds: on cores that others use too a step of the tiny model took 30 times as long.
    # Sleeping at once (OMP_WAIT_POLICY=passive) costs a quiet machine 1.5 times. Read when torch is
    # first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Packed streams have ever new lengths, and oneDNN keeps a compiled product for each: by default
    # 1024 of them, 50 MB a step. Read at the first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "48")

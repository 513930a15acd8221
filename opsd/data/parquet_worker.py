"""The work of a worker process (see `workers`) that reads a parquet file, some rows at a time.

A few bytes of such a file can stand for a billion values: only the kernel's limits bound them.
"""

import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from opsd.common.errors import in_short
from opsd.data.classes import classes_in, with_names

ROWS = 64


def make(path: str) -> Callable[[bytes], bytes]:
    """Returns the function that answers a job: next rows, [] at the end, or an error, pickled."""
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # other pools reserve address space
    batches = _batches(path)

    def answer(job: bytes) -> bytes:
        try:
            return pickle.dumps(next(batches, []))
        except MemoryError:
            raise
        except Exception as error:  # a damaged file can raise anything
            return pickle.dumps(in_short(error))

    return answer


def _batches(path: str) -> Iterator[list[Any]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"it has several columns {', '.join(map(repr, sorted(twice)))}")
        classes = classes_in(_features(file.schema_arrow.metadata or {}))
        for batch in file.iter_batches(ROWS, use_threads=False):
            rows = batch.to_pylist()
            yield rows if classes is None else with_names(rows, classes)


def _features(metadata: dict[bytes, bytes]) -> Any:
    """What `datasets` writes into its files about their columns."""
    try:
        return json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return None

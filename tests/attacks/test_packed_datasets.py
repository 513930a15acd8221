"""Datasets of a few bytes that stand for gigabytes, or never end: one line, and little memory."""

import gzip
import os
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers.mutations import Clock

from opsd.common.errors import UserError
from opsd.data import files, parquet_worker
from opsd.data.files import read_file
from opsd.data.rows import load_rows


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv"])
def test_a_file_of_one_line_without_an_end_is_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("opsd.data.files._json", no_memory)
    monkeypatch.setattr("opsd.data.files._table", no_memory)
    (tmp_path / f"a.{kind}").write_text("[]")
    with pytest.raises(UserError, match="that does not fit into memory"):
        load_rows(str(tmp_path / f"a.{kind}"), require=["problem"])


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("a.jsonl", '{"problem": "1?"}\n'),
        ("b.jsonl", "["),
        ("c.json", "["),
        ("d.csv", "problem,answer\n1?,1\n"),
        ("e.tsv", "problem\tanswer"),
        ("f.ndjson", ""),
    ],
)
def test_a_file_with_a_hole_of_a_terabyte_is_one_line(name, start, tmp_path):
    (tmp_path / name).write_text(start)
    os.truncate(tmp_path / name, 10**12)
    with Clock(), pytest.raises(UserError, match=r"fit into memory|characters in line"):
        load_rows(str(tmp_path / name), require=["problem"])


def no_memory(*_):
    raise MemoryError
    yield


def bomb(draw, path: Path) -> None:
    """A small file of far more than it seems."""
    if path.suffix == ".gz":
        row = "1" * 99 + "\n"
        first, again = draw.choice([("", "a"), ("[", "[],"), ("problem\n", row), ("{", '"a":')])
        one = gzip.compress(again.encode() * ((1 << 24) // len(again)))
        path.write_bytes(gzip.compress(first.encode()) + one * 4)  # one part after another
        return
    some = pyarrow.array([0] * 64, pyarrow.int32())
    values = draw.choice(
        [
            lambda: pyarrow.DictionaryArray.from_arrays(some, pyarrow.array(["a" * 4_000_000])),
            lambda: pyarrow.array([[None] * (1 << 19)] * 64, pyarrow.list_(pyarrow.string())),
            lambda: pyarrow.nulls(1 << 22, pyarrow.string()),
        ]
    )()
    table = pyarrow.table({"problem": values})
    pyarrow.parquet.write_table(table, path, compression="zstd", row_group_size=1 << 26)


def test_a_small_file_is_not_unpacked_without_end(draw, tmp_path, monkeypatch):
    monkeypatch.setattr("opsd.data.files.LEAST", 1 << 22)
    monkeypatch.setattr("opsd.data.files.MEMORY", 1 << 28)
    path = tmp_path / draw.choice(["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.parquet", "b.parquet"])
    bomb(draw, path)
    assert path.stat().st_size < 1 << 18
    rows = iter(read_file(path, "data"))
    # Its first lines may be no rows, which is told before the rest is unpacked.
    with Clock(), pytest.raises(UserError, match=r"it unpacks to more|take too much|line 1 of"):
        for _ in zip(rows, range(1 << 23), strict=False):
            pass


def test_the_rows_of_a_small_parquet_file_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("opsd.data.files.LEAST", 1 << 20)
    table = pyarrow.table({"problem": pyarrow.nulls(1 << 15, pyarrow.string())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="it unpacks to more"):
        list(read_file(tmp_path / "a.parquet", "data"))


def test_a_batch_of_parquet_rows_has_a_bound_of_time(tmp_path, monkeypatch):
    monkeypatch.setattr("opsd.data.files.SECONDS", 0.3)
    values = pyarrow.array([list(range(100_000))] * parquet_worker.ROWS)
    pyarrow.parquet.write_table(pyarrow.table({"problem": values}), tmp_path / "a.parquet")
    with Clock(), pytest.raises(UserError, match=r"take too much time or memory \(time\)"):
        list(read_file(tmp_path / "a.parquet", "data"))


def test_the_bounds_are_those_of_the_text():
    """As SECURITY.md says them: 128 MiB and 100 times, 2 GiB, 20 s, 64 rows."""
    bounds = files.LEAST, files.RATIO, files.MEMORY, files.SECONDS, parquet_worker.ROWS
    assert bounds == (128 << 20, 100, 2 << 30, 20, 64)


def test_a_small_file_takes_no_more_memory_than_it_may(tmp_path, monkeypatch):
    monkeypatch.setattr("opsd.data.files.LEAST", 1 << 22)
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b"[" + b" " * (1 << 26)))
    tracemalloc.start()
    with pytest.raises(UserError, match="it unpacks to more"):
        list(read_file(path, "data"))
    assert tracemalloc.get_traced_memory()[1] < 1 << 25
    tracemalloc.stop()


def test_a_few_rows_of_parquet_have_a_limit_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("opsd.data.files.MEMORY", 1 << 28)
    some = pyarrow.array([0] * 64, pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(some, pyarrow.array(["a" * 9_000_000]))
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"problem": texts}), path, compression="zstd")
    with Clock(), pytest.raises(UserError, match=r"rows take too much .*\(memory\)"):
        list(read_file(path, "data"))

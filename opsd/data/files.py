"""Read records from a file: JSON lines, JSON, CSV, TSV or parquet, plain or gzipped.

For a bad file it raises UserError, naming the section's `source`, the file and the line.
"""

import csv
import gzip
import json
import os
import pickle
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any, TextIO

from opsd.common.errors import UserError
from opsd.common.files import other_kind, read_toml
from opsd.common.strict_json import each_once
from opsd.common.system import memory
from opsd.common.workers import Ended, Workers

LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
FILE_TYPES = (*LINES, ".json", *TABLES, ".parquet")

# Limits for compressed files, against decompression bombs: text shrinks to a third or a thirtieth.
LEAST, RATIO = 1 << 27, 100
TOO_MUCH = f"it unpacks to more than {LEAST >> 20} MiB and {RATIO} times its size"
LONGEST = 1 << 28  # characters of a line
SECONDS, MEMORY = 20.0, 2 << 30  # limits of CPU time and bytes for a batch of parquet rows


def file_type(path: Path) -> str | None:
    """The file's type by its suffix, ".csv" also for rows.csv.gz; None if it cannot be read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
        if suffixes[-1:] == [".parquet"]:
            return None
    return suffixes[-1] if suffixes and suffixes[-1] in FILE_TYPES else None


def read_file(path: Path, section: str) -> Iterator[Any]:
    """Yields the records of a file of a known type, in order. Raises UserError."""
    kind, name = file_type(path), repr(str(path))
    where = f"{section}.source: {name}"
    try:
        if said := other_kind(path):
            raise UserError(f"{where} is {said}")
        if kind == ".parquet":
            yield from _parquet(path, section)
            return
        with path.open("rb") as file:
            zipped = path.suffix.lower() == ".gz" or file.read(2) == b"\x1f\x8b"
        packed = _Unpacked(path) if zipped else path.open("rb")
        with TextIOWrapper(packed, encoding="utf-8-sig", newline="") as file:
            if kind in TABLES:
                yield from _table(file, TABLES[kind], where)
            else:
                yield from _json(file, kind == ".json", section, name)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        kind = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        name = quote(str(path)) if str(path).isprintable() else "FILE"
        mend = f"iconv -f {kind} -t UTF-8 {name} > utf8{path.suffix}"
        raise UserError(f"{where} is not UTF-8 text: `{mend}` mends it ({error})") from error
    except MemoryError:
        raise UserError(f"{where} has a line, or a list, that does not fit into memory") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{where} cannot be read: {error}") from error


def _most_unpacked(path: Path) -> int:
    return max(LEAST, RATIO * path.stat().st_size)


class _Unpacked(gzip.GzipFile):
    """A gzip file's content. Raises OSError if it is larger than the limits above."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.most = _most_unpacked(path)

    def read(self, size: int | None = -1) -> bytes:
        return self._counted(super().read(self.most + 1 if size in (None, -1) else size))

    def read1(self, size: int = -1) -> bytes:
        return self._counted(super().read1(size))

    def _counted(self, data: bytes) -> bytes:
        if self.tell() > self.most:
            raise OSError(TOO_MUCH)
        return data


SLIPS: dict[str, str] = read_toml(__file__, "slips")
"""What a line has that is no JSON → what it was probably meant as."""

_LINES = json.JSONDecoder(object_pairs_hook=each_once)
ONE_A_LINE = "one JSON object a line"
OR_A_LIST = f"{ONE_A_LINE}, or one list of objects, alone or under a key"


def _json(file: TextIO, one_value: bool, section: str, name: str) -> Iterator[Any]:
    """Reads one object per line; or one list of objects, alone or under a key."""
    where = f"{section}.source: {name}"
    if not one_value:  # many .jsonl files contain a list instead
        pieces = iter(partial(file.readline, 1 << 16), "")
        start = next((piece for piece in pieces if piece.strip()), "")
        one_value = start.lstrip().startswith("[")
        file.seek(0)
    if one_value:
        if os.fstat(file.fileno()).st_size > memory()[1] // 2:  # it is held twice
            raise MemoryError
        text = file.read()
        try:
            value = json.loads(text, object_pairs_hook=each_once)
        except (ValueError, RecursionError) as error:
            first = text.lstrip().partition("\n")[0].strip()
            if not (first.startswith("{") and first.endswith("}")):
                lines = ["", *text[: getattr(error, "pos", 0) + 2].splitlines()]
                slip = _slip(f"{lines[-1]}…") or _slip("\n".join(lines[-2:]) + "…")
                raise UserError(
                    f"{where} is not valid JSON ({error}){slip}; expected {OR_A_LIST}"
                ) from error
            file.seek(0)  # one object a line
        else:
            lists = [value] if isinstance(value, list) else _listed(value)
            found = lists[0] if len(lists) == 1 else transposed(value)
            keys = ", ".join(map(repr, value)) if isinstance(value, dict) else type(value).__name__
            parts = lists if len(lists) > 1 and str not in map(type, value.values()) else []
            if parts:  # such as train and test; or features and rows, from the hub's server
                longest = next(key for key, part in value.items() if part is max(parts, key=len))
                mend = f"`jq '.[\"{longest}\"]' {quote(file.name)} > rows.json` takes one"
                raise UserError(f"{where} holds several lists of rows, {keys}: {mend}")
            if found is None and isinstance(value, dict) and "\n" not in text.strip():
                found = [value]
            if found is None:
                raise UserError(f"{where} holds {keys}: expected {OR_A_LIST}")
            yield from found
            return
    for number, line in enumerate(_lines(file, where), start=1):
        if line.strip():
            yield _line(line, number, OR_A_LIST if one_value else ONE_A_LINE, section, name)


def _lines(file: TextIO, where: str) -> Iterator[str]:
    """The file's lines. Raises UserError for one that is too long."""
    for number, line in enumerate(iter(partial(file.readline, LONGEST + 1), ""), start=1):
        if len(line) > LONGEST:
            raise UserError(f"{where} has more than {LONGEST:,} characters in line {number}")
        yield line


def _listed(value: Any) -> list[list[Any]]:
    """The lists of objects in an object; none if one is a chat, whose messages are one row's."""
    values = value.values() if isinstance(value, dict) else ()
    lists = [v for v in values if isinstance(v, list) and v and isinstance(v[0], dict)]
    chats = ({"role", "content"}, {"from", "value"})
    return [] if any(keys <= one[0].keys() for keys in chats for one in lists) else lists


def transposed(value: Any) -> list[dict] | None:
    """The rows of an object that holds columns of equal length, as pandas' `to_dict` makes it:
    `{"problem": ["…"]}`, `{"problem": {"0": "…"}}`, or `{"0": {"problem": "…"}}`; else None."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if columns and all(isinstance(c, dict) and c.keys() == columns[0].keys() for c in columns):
        if all(map(str.isdecimal, value)):
            return columns
        columns = [list(column.values()) for column in columns]
    if not all(isinstance(c, list) and c and len(c) == len(columns[0]) for c in columns):
        return None
    if not any(isinstance(column[0], str) for column in columns):
        return None  # one row's chat, or several lists of objects
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _line(line: str, number: int, expected: str, section: str, name: str) -> Any:
    where = f"{section}.source: line {number} of {name}"
    try:
        return _LINES.decode(line)
    except json.JSONDecodeError as error:
        said = f"is not valid JSON ({error.msg.removesuffix(' at')} at column {error.colno})"
        said += f"{_slip(line)}; expected {expected}"
    except (ValueError, RecursionError) as error:  # a number too long, or nesting too deep
        said = f"cannot be read ({error})"
    raise UserError(f"{where} {said}")


def _slip(text: str) -> str:
    return next((one for found, one in SLIPS.items() if re.search(found, text)), "")


def _table(file: TextIO, delimiter: str, where: str) -> Iterator[dict[str, str]]:
    """Reads rows; the first line names the columns. All values are text."""
    csv.field_size_limit(1 << 30)
    lines = _lines(file, where)
    first = next(lines, "")
    delimiter = _delimiter(first, delimiter)
    spaced, lines = f"{delimiter} " in first, chain([first], lines)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        named = list(filter(None, names))
        unnamed = [i for i in range(1, len(names)) if not names[i]]  # the first is pandas' index
        bad_names = f"{where}: its first line must name the columns"
        if twice := [name for name in named if named.count(name) > 1]:
            raise UserError(f"{bad_names}, each once: it names {twice[0]!r} twice")
        if not named:
            raise UserError(f"{bad_names}: {names}")
        for values in filter(None, reader):
            if len(values) != len(names):
                raise UserError(
                    f"{where}: line {reader.line_num} has {len(values)} fields, and the first line "
                    f"names {len(names)} columns (quote text with {delimiter!r} or a line's end)"
                )
            if any(values[i].strip() for i in unnamed):  # a comma at each line's end is nothing
                said = f"line {reader.line_num} has text in a column without a name"
                raise UserError(f"{bad_names}: {said}")
            yield {name: value for name, value in zip(names, values, strict=True) if name}
    except csv.Error as error:
        raise UserError(f"{where}: line {reader.line_num} cannot be read ({error})") from error


def _delimiter(line: str, usual: str) -> str:
    """What separates the names: a .csv file may have tabs, or `;` where decimals have commas."""
    for one in (usual, ";", "\t"):
        with suppress(csv.Error):
            if len(next(csv.reader([line], delimiter=one, strict=True), [])) > 1:
                return one
    return usual


def _parquet(path: Path, section: str) -> Iterator[Any]:
    room = _most_unpacked(path)
    said = f"{section}.source: {str(path)!r} cannot be read as parquet"
    workers = Workers("opsd.data.parquet_worker", str(path), seconds=SECONDS, memory=MEMORY)
    try:
        while True:
            (reply,) = workers.answers([b""])
            if isinstance(reply, Ended):
                raise UserError(f"{said}: some rows take too much time or memory ({reply.why})")
            rows = pickle.loads(reply)  # made by our own process
            room -= len(reply) + 64 * len(rows)
            if room < 0:
                raise UserError(f"{said}: {TOO_MUCH}")
            if isinstance(rows, str):
                raise UserError(f"{said}: {rows}")
            if not rows:
                return
            yield from rows
    finally:
        workers.close()

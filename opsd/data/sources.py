"""Where rows come from: files, saved directories, the hub, or a generator of problems."""

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError

REASONING_GYM = "reasoning_gym:"

DEFAULT_DRAW = 1000

_FILE_TYPES = (".jsonl", ".json", ".parquet")

_HUB_OPTIONS = ("name", "revision")

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def _kind(value: Any) -> str:
    kinds = {list: "a list", dict: "an object", float: "a fraction", bool: "true or false"}
    return kinds.get(type(value), f"of type {type(value).__name__}") + (
        f" ({value!r})" if isinstance(value, int | float) else ""
    )


def _check_names(field: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            allowed = ", ".join(map(repr, known)) or "none"
            raise UserError(f"{field}: {name!r} is not known{hint} (allowed: {allowed})")


def _stored(source: str, split: str, options: dict, section: str) -> Iterable[Any]:
    path = Path(source).expanduser()
    if path.exists():
        _check_names(f"{section}.options", options, ())
        if path.is_dir():
            return _saved_directory(path, split, section)
        if path.suffix not in _FILE_TYPES:
            raise UserError(
                f"{section}.source: {source!r} is not a {', '.join(_FILE_TYPES)} file, nor a "
                "directory saved by `datasets`"
            )
        if path.suffix == ".parquet":
            return _parquet(path, section)
        return _json_file(path, section)
    looks_local = path.suffix in (*_FILE_TYPES, ".csv", ".tsv", ".txt", ".arrow", ".gz")
    if looks_local or source[:1] in "./~" or not _HUB_NAME.fullmatch(source):
        raise UserError(
            f"{section}.source: there is no file or directory {source!r} (it may be a path, "
            "a hub name `owner/name`, or `reasoning_gym:<task>`)"
        )
    return _hub(source, split, options, section)


def _json_file(path: Path, section: str) -> Iterator[Any]:
    """Objects one a line, or (in a .json file) one list of them."""
    try:
        if path.suffix == ".json":
            with path.open(encoding="utf-8-sig") as file:
                is_list = file.read(4096).lstrip()[:1] == "["
            if is_list:
                yield from json.loads(path.read_text(encoding="utf-8-sig"))
                return
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_line(line, number, path, section)
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{section}.source: {str(path)!r} is not UTF-8 text: {error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{section}.source: {str(path)!r} is not valid JSON: {error}") from error
    except OSError as error:
        raise UserError(f"{section}.source: {str(path)!r} cannot be read: {error}") from error


def _json_line(line: str, number: int, path: Path, section: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        expected = "one JSON object a line"
        if path.suffix == ".json":
            expected += ", or one list of objects"
        raise UserError(
            f"{section}.source: line {number} of {str(path)!r} is not valid JSON ({error.msg} at "
            f"column {error.colno}); expected {expected}"
        ) from error
    except (ValueError, RecursionError) as error:  # an endless number, or nesting without end
        raise UserError(
            f"{section}.source: line {number} of {str(path)!r} cannot be read ({error})"
        ) from error


def _parquet(path: Path, section: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{section}.source: {str(path)!r} cannot be read as parquet: {error}"
        ) from error


def _saved_directory(path: Path, split: str, section: str) -> Iterable[Any]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever a damaged directory provokes
        raise UserError(
            f"{section}.source: the directory {str(path)!r} was not saved by `datasets` "
            f"(Dataset.save_to_disk), or is damaged: {_first_line(error)}"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        _check_names(f"{section}.split", [split], list(data))
        data = data[split]
    return data


def _hub(name: str, split: str, options: dict, section: str) -> Iterable[Any]:
    from opsd.common.hub_offline import before_asking_hub

    before_asking_hub(name)
    import datasets

    _check_names(f"{section}.options", options, _HUB_OPTIONS)
    try:
        return datasets.load_dataset(
            name, options.get("name"), split=split, revision=options.get("revision")
        )
    except Exception as error:  # offline, absent, gated, no such split or configuration
        advice = (
            "choose one with options: {name: …}"
            if "Config name is missing" in str(error)
            else "check the name, the split and the connection, or give a file or a directory "
            "saved by `datasets`"
        )
        raise UserError(
            f"{section}.source: {name!r} (split {split!r}) is no local path and cannot be loaded "
            f"from the hub: {_first_line(error)}; {advice}"
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _draw(source: str, size: int, seed: int, options: dict, section: str) -> Iterable[Any]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(
            f"{section}.source is {source!r}: it needs pip install reasoning-gym ({error})"
        ) from None

    task = source.removeprefix(REASONING_GYM)
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise UserError(
            f"{section}.source: reasoning_gym has no task {task!r}{hint} ({len(DATASETS)} tasks: "
            "reasoning_gym.factory.DATASETS)"
        )
    known = [field.name for field in fields(DATASETS[task][1])]
    _check_names(
        f"{section}.options", options, [name for name in known if name not in ("seed", "size")]
    )
    try:
        drawn = reasoning_gym.create_dataset(
            task, size=size, seed=_task_seed(task, seed), **options
        )
        yield from (drawn[index] for index in range(size))
    except Exception as error:  # tasks check their options by assert, or not at all
        raise UserError(
            f"{section}.options: reasoning_gym's {task!r} does not work with {options!r}: "
            f"{_first_line(error)}"
        ) from error


def _task_seed(task: str, seed: int) -> int:
    """A seed far from those of neighbouring seeds.

    The library draws problem i from seed + i: with the bare seeds 0 and 1, nearly all problems
    would be the same, one place further on. 31 bits, since some tasks hand seed + i to numpy.
    """
    digest = hashlib.blake2b(f"{task}:{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 33

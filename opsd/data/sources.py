"""Read records from files, saved directories or the hub, or draw them from reasoning_gym."""

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from glob import glob
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError, in_short
from opsd.common.near import did_you_mean, near_file, near_hub, nearest
from opsd.common.strict_json import read_object, texts
from opsd.config.yaml import MAX_BYTES, load_yaml
from opsd.data.classes import classes_in, with_names
from opsd.data.files import FILE_TYPES, file_type, read_file

REASONING_GYM = "reasoning_gym:"
DEFAULT_DRAW = 1000
IMAGE_ROWS = 16  # that are read at once
_OWN = {".jsonl", ".csv", ".parquet"}  # of a directory `datasets` reads the commonest kind alone
_HUB_OPTIONS = ("name", "revision")
CHOOSE = "choose one with options: {name: …}"
_ELSEWHERE = re.compile(r"^/|^\w[\w+.-]*:\S|://|::")  # `file:a` is a path too
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_GYM = re.compile("reasoning[-_ ]?gym(?:[:/](.+))?", re.IGNORECASE)  # typed in another way
_MENDS = dict.fromkeys((".xlsx", ".xls", ".ods"), "; save it as .csv")
_MENDS |= dict.fromkeys((".pkl", ".pickle"), "; pandas' `to_parquet` writes what is read here")
_MENDS |= {".arrow": "; name its directory, {path.parent}"}
_MENDS |= dict.fromkeys((".txt", ".jl"), "; one JSON object a line is {path.stem}.jsonl")


def kind_of(value: Any) -> str:
    """A value's type in words, for a message."""
    kinds = {list: "a list", dict: "an object", float: "a fraction", bool: "true or false"}
    return kinds.get(type(value), f"of type {type(value).__name__}") + (
        f" ({value!r})" if isinstance(value, int | float) else ""
    )


def check_names(field: str, given: Iterable[str], known: Sequence[str], usual: Any = ()) -> None:
    """Raises UserError for an unknown name, suggesting the nearest known one. usual: known name →
    what others call it."""
    for name in given:
        if name in known:
            continue
        hint, allowed = did_you_mean(str(name), known), ", ".join(map(repr, known)) or "none"
        setting = "--columns " if field == "benchmark.columns" else f"{field}."
        value, near = given[name] if isinstance(given, dict) else "", nearest(name, known, 0.7)
        if value in known and not near:
            hint = f"; did you mean {setting}{value}={name}? Ours stands first"
        elif value and (near := near or next((our for our in usual if name in usual[our]), None)):
            hint = f"; did you mean {setting}{near}={value}?"
        raise UserError(f"{field}: {name!r} is not known{hint} (allowed: {allowed})")


def stored(
    source: str, split: str | None, default: str, options: dict, section: str
) -> Iterable[Any]:
    """The records of a file, a saved directory or a hub dataset, by default of split `default`."""
    path = Path(os.path.expanduser(source))
    if path.exists():
        check_names(f"{section}.options", options, _HUB_OPTIONS[:1] if path.is_dir() else ())
        if not path.is_dir() and file_type(path) is None:
            mend = _MENDS.get(path.suffix, "").format(path=path)
            raise UserError(
                f"{section}.source: {source!r} is not a {', '.join(FILE_TYPES)} file (or one of "
                f"these but .parquet with .gz), nor a directory saved by `datasets`{mend}"
            )
        for file in (path, *_files_below(path)):
            # os.path: what a link leads to may be another's, which for pathlib is an error.
            if os.path.exists(file) and not (os.path.isfile(file) or os.path.isdir(file)):
                said = "a pipe or a device, which may have no end"
                raise UserError(f"{section}.source: {str(file)!r} is {said}")
        if path.is_dir():
            return _saved_directory(path, split, default, section, options.get("name"))
        check_no_split(source, split, section)
        return read_file(path, section)
    if not is_remote(source):
        name, _, rows = source.partition("#")  # as ms-swift has it
        hint = near_file(source, ("", *FILE_TYPES))
        hint = f"; write {section}.source={name} {section}.limit={rows}" if rows else hint
        hint = "; download it, and name the file" if "://" in source and not hint else hint
        if gym := _GYM.fullmatch(source):
            hint = f"; did you mean '{REASONING_GYM}{gym[1] or 'chain_sum'}'?"
        if several := sorted(glob(os.path.expanduser(source))):
            how = "name all in a list:" if section == "data" else "name one of"
            hint = f"; it takes no wildcards: {how} {several}"
        may = "(it may be a path, a hub name `owner/name`, or `reasoning_gym:<task>`)"
        raise UserError(f"{section}.source: there is no file or directory {source!r}{hint} {may}")
    return _hub(source, split or default, options, section)


def _files_below(path: Path) -> Iterator[Path]:
    """All files below a directory; none where it cannot be read, or has gone meanwhile."""
    for place, _, names in os.walk(path):
        yield from (Path(place, name) for name in names)


def encoded(data: Iterable[Any]) -> Iterable[Any]:
    """The records; those of a dataset as it stores them, whatever its format (torch's, pandas'),
    but with the names of classes. Images are as their files have them, not as pixels, all of which
    would be in memory at once."""
    features, form = getattr(data, "features", None), getattr(data, "format", None)
    if not hasattr(data, "with_format") or (form and form["type"] == "custom"):
        return data  # a dataset with a transform is what that makes of it
    if "Image(" in str(features):
        tables = data.with_format("arrow").iter(IMAGE_ROWS)
        records = (record for table in tables for record in table.to_pylist())
    else:
        records = data.with_format(None)
    classes = None if features is None else classes_in(features.to_dict())
    return records if classes is None else (with_names(record, classes) for record in records)


def part_of(parts: Mapping[str, Any], split: str, section: str) -> Any:
    """A DatasetDict's split, also `train[:10%]` or `train+test`. Raises UserError."""
    if split in parts:
        return parts[split]
    import datasets

    try:
        sizes = {name: len(part) for name, part in parts.items()}
        asked = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (AssertionError, TypeError, ValueError):  # streams have no length
        asked = []
    chosen = [parts[one.splitname].select(range(one.from_, one.to)) for one in asked]
    if not chosen:
        check_names(f"{section}.split", [split], list(parts))
    return datasets.concatenate_datasets(chosen)


def is_remote(source: str) -> bool:
    """Whether a source is on the hub or from a generator: no file, and no name like a file's."""
    path = Path(os.path.expanduser(source))
    if source.startswith(REASONING_GYM) or _GYM.fullmatch(source):
        return source.startswith(REASONING_GYM)
    looks_local = (
        path.suffix.lower() in (*FILE_TYPES, ".txt", ".arrow", ".gz") or source[:1] in "./~"
    )
    looks_local |= "/" not in source and any(Path(f"{path}{kind}").is_file() for kind in FILE_TYPES)
    return not (path.exists() or looks_local) and bool(_HUB_NAME.fullmatch(source))


def check_on_hub(source: str, options: Mapping[str, Any], section: str) -> None:
    """Raises UserError for a dataset that the hub certainly lacks: see `why_absent`."""
    from opsd.common.hub_offline import why_absent

    if not is_remote(source) or source.startswith(REASONING_GYM):
        return
    if said := why_absent(source, options.get("revision"), "dataset"):
        raise UserError(
            f"{section}.source is {source!r}: neither a file or directory nor a hub dataset that "
            f"can be reached ({said}){near_hub(source, 'datasets')}"
        )


def check_no_split(source: str, split: str | None, section: str) -> None:
    """Raises UserError if a split is given: this source has none."""
    if split is not None:
        mend = "leave it out, or name the file of that split"
        if "[" in split:  # a slice, as `datasets` has it
            few = {"benchmark": "--problems ", "eval": "eval.problems="}.get(section, "data.limit=")
            first = re.search(r"\[:(\d+)\]", split)
            mend = f"leave it out; {few}{first[1] if first else 'N'} takes so many rows"
        raise UserError(f"{section}.split is {split!r}: {source!r} has no splits; {mend}")


def _saved_directory(
    path: Path, split: str | None, default: str, section: str, name: str | None
) -> Iterable[Any]:
    if any(path.glob("*.safetensors")):
        raise UserError(f"{section}.source is {str(path)!r}: a model; model.path is to name it")
    import datasets

    datasets.disable_progress_bars()
    marks = ("dataset_dict.json", "dataset_info.json", "state.json")
    files = [file for file in sorted(_files_below(path)) if file_type(file)]
    shards = files if not any((path / mark).exists() for mark in marks) else []
    try:
        if shards:  # data files: `datasets` assigns them to splits
            _check_inside(card := _card(path))
            if not any(card) and len(kinds := {file_type(file) for file in shards} & _OWN) > 1:
                raise UserError(
                    f"{section}.source: the directory {str(path)!r} has "
                    f"{' and '.join(sorted(kinds))} files, and one kind would be read: name them"
                )
            return encoded(datasets.load_dataset(str(path), name, split=split or default))
        check_names(f"{section}.options", [] if name is None else ["name"], ())
        lists = (path / "dataset_dict.json", path / "state.json", *path.glob("*/state.json"))
        known = [read_object(file, f"{section}.source") for file in lists if file.is_file()]
        _check_inside([[one.get("splits"), one.get("_data_files")] for one in known])
        data = datasets.load_from_disk(str(path))
    except UserError:
        raise
    except Exception as error:  # a damaged directory can raise anything
        if shards and "Config name is missing" in str(error):
            raise UserError(
                f"{section}.options: {str(path)!r}: {in_short(error)}; {CHOOSE}"
            ) from error
        one = next((f for f in shards if (split or default) in f.name), shards and shards[0])
        hint = f"; if its files are not alike, name one, as in {one}" if one else ""
        raise UserError(
            f"{section}.source: the directory {str(path)!r} was not saved by `datasets`, has no "
            f"files that it reads, or is damaged: {in_short(error)}{hint}"
        ) from error
    if isinstance(data, datasets.DatasetDict):
        data = part_of(data, split or default, section)
    else:
        check_no_split(str(path), split, section)
    return _guarded(encoded(data), f"{section}.source: {str(path)!r} is damaged")


def _check_inside(named: Any) -> None:
    """Raises ValueError if a directory names files elsewhere, which `datasets` would read."""
    for name in texts(named):
        if _ELSEWHERE.search(name) or ".." in name.split("/"):
            raise ValueError(f"it names {name!r}, which is not in it")


def _card(path: Path) -> list[Any]:
    """The `configs` of a directory's card. Raises an error for one that takes long to read, since
    it is large or of aliases."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    found = []
    for card in filter(Path.is_file, (path / "README.md", path / ".huggingface.yaml")):
        if card.stat().st_size > MAX_BYTES:
            raise ValueError(f"{card.name} has more than {MAX_BYTES:,} bytes")
        text = card.read_bytes().decode()
        block = REGEX_YAML_BLOCK.search(text) if card.suffix == ".md" else [text] * 3
        found.append((load_yaml(block[2] if block else "") or {}).get("configs"))
    return found


def _hub(name: str, split: str, options: dict, section: str) -> Iterable[Any]:
    from opsd.common.hub_offline import before_asking_hub

    check_on_hub(name, options, section)
    before_asking_hub(name)
    import datasets

    check_names(f"{section}.options", options, _HUB_OPTIONS)
    try:
        data = datasets.load_dataset(
            name, options.get("name"), split=split, revision=options.get("revision")
        )
    except Exception as error:  # offline, absent, gated, no such split or configuration
        advice = "check the name, the split and the connection, or give a file"
        advice = CHOOSE if "Config name is missing" in str(error) else advice
        raise UserError(
            f"{section}.source: {name!r} (split {split!r}) is no local path and cannot be loaded "
            f"from the hub: {in_short(error)}; {advice}"
        ) from error
    return _guarded(encoded(data), f"{section}.source: {name!r} (split {split!r}) is damaged")


def draw(source: str, size: int, seed: int, options: dict, section: str) -> Iterable[Any]:
    """Yields `size` problems of a reasoning_gym task. Raises UserError."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(
            f"{section}.source is {source!r}: it needs pip install reasoning-gym ({error})"
        ) from None

    task = source.removeprefix(REASONING_GYM)
    if task not in DATASETS:
        near = [name for name in DATASETS if name.startswith(task[:3])][:3]
        near = near or difflib.get_close_matches(task, DATASETS, n=3, cutoff=0.4)
        hint = f"; near it: {', '.join(near)}" if near else f" among its {len(DATASETS)}"
        raise UserError(f"{section}.source: reasoning_gym has no task {task!r}{hint}")
    known = [field.name for field in fields(DATASETS[task][1])]
    check_names(
        f"{section}.options", options, [name for name in known if name not in ("seed", "size")]
    )
    try:
        drawn = reasoning_gym.create_dataset(
            task, size=size, seed=_task_seed(task, seed), **options
        )
        yield from (drawn[index] for index in range(size))
    except Exception as error:  # tasks check their options by assert, or not at all
        tried = f"reasoning_gym's {task!r} does not work with {options!r}"
        raise UserError(f"{section}.options: {tried}: {in_short(error)}") from error


def _task_seed(task: str, seed: int) -> int:
    """A seed for the library, far from those of neighbouring `seed`s.

    The library draws problem i from seed + i: with plain seeds 0 and 1 nearly all problems would be
    the same, shifted by one. It has 31 bits, since some tasks pass seed + i to numpy.
    """
    digest = hashlib.blake2b(f"{task}:{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 33


def _guarded(records: Iterable[Any], said: str) -> Iterator[Any]:
    """Yields the records; turns any exception of the library that reads them into a UserError."""
    try:
        yield from records
    except Exception as error:
        raise UserError(f"{said}: {in_short(error)}") from error

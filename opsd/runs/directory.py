"""A run's directory: locks it for one run, checks whose it is, and finds its checkpoints."""

import datetime
import errno
import hashlib
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from opsd.common import files
from opsd.common.errors import UserError, in_short
from opsd.common.saved_directory import MANIFEST, check_saved
from opsd.config.config import Config
from opsd.config.load import load_config, save_config
from opsd.config.yaml import read_yaml
from opsd.data.rows import Row
from opsd.runs.records import Anything, StepLine, TrainerState, checked_lines, read_record

CONFIG = "config.yaml"
LOCK = "run.lock"
PROBLEMS = "problems.json"
METRICS = "metrics.jsonl"

MAY_CHANGE = tuple(files.read_toml(__file__, "resume")["may_change"])
"""Config fields, and whole sections, that may change on resume: they say where and in what pieces
the run computes, how long, and what it writes, not what it learns. train.steps may change too, if
the learning rate does not depend on it."""

NAMED = 3
"""The most fields that a message names."""


@contextmanager
def locked(
    directory: Path,
    field: str = "output.dir",
    mark: str = CONFIG,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
    """A context in which no other process trains in the directory. The lock ends with the process,
    however that ends. Where the file system has no locks, the directory belongs to the process that
    last wrote its id into the lock file, while it lives; a process on another machine is not
    noticed, and `note` is called with a sentence that says so.

    field: the option that named the directory, for messages.
    mark: a file of our own; without it, a directory that holds files belongs to something else.

    Raises UserError where another process has the lock.
    """
    where = f"{field} is {str(directory)!r}"
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{where}: a file is in the way")
    with _or_cannot_write(directory, field):
        directory.mkdir(parents=True, exist_ok=True)
        foreign = [path for path in directory.iterdir() if path.name != LOCK]
        ours = not foreign or (directory / mark).is_file()
        file = files.append_to(directory / LOCK) if ours else None
    if file is None:
        yield  # not a run's directory; `claim_directory` raises the error
        return
    with file:
        got = files.try_lock(file)
        file.seek(0)
        text = file.read(1000).decode(errors="replace") + "\n\n"  # anybody may have written it
        holder, told = text.split("\n")[:2]
        if got is None:
            note(f"{where}: no locks there; a run on another machine would not be noticed")
        number = holder.split(" ")[0]
        living = number.isdecimal() and int(number) != os.getpid() and _mark(int(number)) == holder
        if got is False or (got is None and living):
            raise UserError(
                f"{where}: process {number or '?'} is training there{told and f', {told}'}; "
                "wait for it, or choose another directory"
            )
        with _or_cannot_write(directory, field):
            file.truncate(0)
            program = [Path(sys.argv[0]).name.replace("__main__.py", "opsd"), *sys.argv[1:]]
            since = datetime.datetime.now().isoformat(" ", "minutes")
            told = f"on {platform.node()} since {since} by `{shlex.join(program)[:300]}`"
            file.write(f"{_mark(os.getpid())}\n{told}\n".encode(errors="replace"))
            file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                file.truncate(0)


def _mark(process: int) -> str:
    """Identify a living process of this machine by its id and start, since ids are used again."""
    import psutil

    try:
        return f"{process} {psutil.Process(process).create_time():.2f} {platform.node()}"
    except (psutil.Error, OverflowError, ValueError):
        return ""


def settle(config: Config, directory: Path, best_precision: str) -> Config:
    """Fill in what the config leaves open but a run decides once, so that it is the same tomorrow
    and on another machine: the date that a chat template prints as today's, and the precision
    (`best_precision` if a new run has `auto`)."""
    try:
        saved = read_yaml(directory / CONFIG)
        date, precision = saved["prompts"]["date"], saved["train"]["precision"]
        datetime.date.fromisoformat(date)
    except (UserError, OSError, LookupError, TypeError):
        date = precision = None  # no run yet
    except ValueError:
        file = directory / CONFIG
        raise UserError(f"{str(file)!r} has prompts.date {date!r}, which is no date") from None
    date = config.prompts.date or date or datetime.date.today().isoformat()
    if config.train.precision != "auto":
        precision = config.train.precision
    elif precision not in ("bf16", "fp32"):
        precision = best_precision
    prompts = config.prompts.model_copy(update={"date": date})
    train = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update={"prompts": prompts, "train": train})


def claim_directory(
    directory: Path, config: Config, resume: bool, start_over: bool = True
) -> Path | None:
    """Make the run's directory, or check that it is this run's; returns its last checkpoint.

    Removes files that an interrupted run wrote only in part. Raises UserError when the directory
    belongs to another run or to something else and, unless it may `start_over`, when steps were
    done but no checkpoint was written.
    """
    check_claim(directory, config, resume)
    if not start_over:
        check_goes_on(directory)
    for left in directory.glob("*.part"):
        files.remove(left)
    with _or_cannot_write(directory):
        directory.mkdir(parents=True, exist_ok=True)
        files.sync(directory.parent)
        save_config(config, directory / CONFIG)
    return last_checkpoint(directory)


def check_goes_on(directory: Path) -> None:
    """Raise UserError if steps were done there and no checkpoint was written."""
    done = sum(1 for _ in checked_lines(directory / METRICS, StepLine))
    if done and not checkpoints_in(directory):
        raise UserError(
            f"output.dir is {str(directory)!r}: of its {done} steps there is no checkpoint to go "
            f"on from; `{command_to_go_on(directory)} --start-over` begins again"
        )


def check_claim(directory: Path, config: Config, resume: bool) -> None:
    """Raise UserError if the directory belongs to something else, to another run, or to this run,
    unless it is to `resume`. config: as `settle` returns it."""
    mine = directory / CONFIG
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output.dir is {str(directory)!r}: a file is in the way")
    # If there is only a config, nothing has run yet: the data or the model had an error.
    problems = directory / PROBLEMS
    nothing = {mine, problems, directory / LOCK, directory / "base"}
    there = list(directory.iterdir()) if directory.exists() else []
    if any(path not in nothing and not files.is_unfinished(path) for path in there):
        name, mend = repr(str(directory)), "choose another directory"
        if not mine.is_file():
            raise UserError(f"output.dir is {name}: it holds files that are not a run's; {mend}")
        if said := "; ".join(_changed(mine, config)):
            raise UserError(
                f"output.dir is {name}: it belongs to a run with another config ({said}); {mend}"
            )
        if not resume:
            mend = "go on with --resume (Python: resume_from_checkpoint=True), or choose another"
            raise UserError(f"output.dir is {name}: this run has been started before; {mend}")


def is_done(directory: Path, config: Config) -> bool:
    """Whether the directory holds the finished run of this config, and no longer one is asked."""
    mine = directory / CONFIG
    if not (directory / "summary.json").is_file():
        return False
    # See `settle`: the run decided these when it began.
    kept, config = _flat(load_config(mine).model_dump()), config.model_copy(deep=True)
    config.prompts.date = config.prompts.date or kept.get("prompts.date")
    if config.train.precision == "auto":
        config.train.precision = kept["train.precision"]
    asked = _flat(config.model_dump())
    same_length = all(asked[name] == kept[name] for name in ("train.steps", "train.token_budget"))
    return same_length and not _changed(mine, config)


@contextmanager
def _or_cannot_write(directory: Path, field: str = "output.dir") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{field} is {str(directory)!r}: cannot write there ({files.why_not_written(error)})"
        ) from None


def command_to_go_on(directory: Path) -> str:
    """The command that resumes the run in this directory."""
    return f"opsd train {shlex.quote(str(directory))} --resume"


class NotWritten(UserError):
    """The disk did not take what a run had to save; `what` says so without advice."""

    what = ""


@contextmanager
def written(directory: Path, what: str, needed: int = 0) -> Iterator[None]:
    """A context that writes `needed` bytes. Raises NotWritten where the disk does not take them."""
    try:
        yield
    except Exception as error:
        why = None if isinstance(error, UserError) else files.why_not_written(error)
        if why is None:  # errors of C++ writers do not always tell that the disk is full
            if shutil.disk_usage(directory).free >= needed:
                raise
            why = files.REASONS[errno.ENOSPC]
        said = f"output.dir is {str(directory)!r}: {why}, {what} could not be written"
        go_on = f"`{command_to_go_on(directory)}` goes on from it"
        told = NotWritten(f"{said}; what was saved before is whole, and {go_on}")
        told.what = said
        raise told from error


def checkpoints_in(directory: Path) -> list[Path]:
    """The run's checkpoints, oldest first. Other names, such as checkpoint-best, do not count."""
    found = directory.glob("checkpoint-*")
    named = [p for p in found if re.fullmatch("checkpoint-[1-9][0-9]{0,17}", p.name) and p.is_dir()]
    return sorted(named, key=step_of)


def step_of(checkpoint: Path | None) -> int:
    """The step at which a checkpoint was written; 0 for None."""
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint, or None. Raises UserError if it is damaged, with a command that
    continues from the one before."""
    found, said = checkpoints_in(directory), None
    for place in reversed(found):
        try:
            _check(place)
        except UserError as error:
            said = said or str(error)
            continue
        if said is None:
            return place
        later = shlex.join(["rm", "-r", *map(str, found[found.index(place) + 1 :])])
        go_on = f"`{later} && {command_to_go_on(directory)}` goes on from {place.name}"
        raise UserError(f"{said}; {go_on}")
    if said is not None:
        raise UserError(f"{said}; there is no whole checkpoint before, begin in another output.dir")
    return None


def _check(checkpoint: Path) -> None:
    if check_saved(checkpoint, "output.dir") is None:
        missing = str(checkpoint / MANIFEST)
        raise UserError(f"output.dir: {missing!r} is missing, and a run always writes it")
    with or_unreadable(checkpoint):
        step = read_record(checkpoint / "trainer_state.json", TrainerState).global_step
        if step != step_of(checkpoint):
            raise ValueError(f"trainer_state.json is of step {step}")


def check_problems(
    directory: Path, rows: Mapping[str, Sequence[Row]], checkpoint: Path | None
) -> None:
    """Write a digest of the run's problems; on resume, compare with the digest that is there.

    rows: the rows of each config field that names a source.

    Raises UserError where a file or a dataset has changed: the run would train on other problems.
    """
    file = directory / PROBLEMS
    here = {field: {"rows": len(of), "sha256": _digest(of)} for field, of in rows.items()}
    if checkpoint is not None and os.path.lexists(file):
        try:
            there = read_record(file, Anything).record
        except UserError as error:
            raise UserError(
                f"{error}; without that file the run goes on with whatever problems there are now"
            ) from None
        for field, now in here.items():
            before = there.get(field)
            if before != now:
                rows_then = before.get("rows") if isinstance(before, dict) else "no"
                raise UserError(
                    f"{field}: the problems are not those that the run in {str(directory)!r} began "
                    f"with ({rows_then} rows then, {now['rows']} now); restore them, or "
                    "begin another run in another output.dir"
                )
        return
    with _or_cannot_write(directory):
        files.write_json(file, here)


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        images = [image.digest for image in row.images]
        digest.update(repr((row.problem, row.solution, row.answer, *images)).encode())
    return digest.hexdigest()


@contextmanager
def or_unreadable(checkpoint: Path) -> Iterator[None]:
    """A context that reads a checkpoint of tensors and numbers. Raises UserError where a file holds
    anything else, or is cut off."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"output.dir: {str(checkpoint)!r} cannot be read ({in_short(error)})"
        ) from error


def _changed(path: Path, config: Config) -> list[str]:
    """The fields that differ from the file's but may not change on resume, with both values."""
    try:
        there = _flat(load_config(path).model_dump())
    except (UserError, OSError):
        return [f"{path.name} there cannot be read"]
    here = _flat(config.model_dump())
    free = MAY_CHANGE + (("train.steps",) if config.train.schedule in (None, "constant") else ())
    found = [
        f"{name} is {there.get(name)!r} there, {here.get(name)!r} here"
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
        and (name, there.get(name)) != ("prompts.date", None)  # a run that began without one
        and not any(name == field or name.startswith(f"{field}.") for field in free)
    ]
    more = [f"{len(found) - NAMED} more"] if len(found) > NAMED else []
    return found[:NAMED] + more


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries into one with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found

"""A run's directory: whose it is, what an interrupted run has left in it, and who trains there."""

import datetime
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError, in_short
from opsd.common.files import is_unfinished, write_json
from opsd.config.config import Config
from opsd.config.load import load_config, save_config
from opsd.config.yaml import read_yaml
from opsd.data.rows import Row

CONFIG = "config.yaml"
LOCK = "run.lock"
PROBLEMS = "problems.json"

MAY_CHANGE = (
    "train.token_budget",
    "train.micro_batch_tokens",
    "train.share_prefixes",
    "train.prefix_kernel",
    "train.gradient_checkpointing",
    "train.not_finite",
    "train.save_every",
    "train.save_total_limit",
    "train.collapse",
    "loss.backend",
    "loss.memory_budget",
    "rollout.batch_size",
    "rollout.gpu_memory",
    "rollout.server",
    "rollout.server_timeout",
    "rollout.server_patience",
    "rollout.weights_dir",
    "eval.every",
    "eval.batch_size",
    "eval.samples",
    "output",
)
"""Config fields, and whole sections, that may change on resume: they say where and in what pieces
the run computes, how long, and what it writes, not what it learns. train.steps may change too, if
the learning rate does not depend on it."""

NAMED = 3
"""Fields that a message names at most."""


@contextmanager
def locked(directory: Path, field: str = "output.dir", mark: str = CONFIG) -> Iterator[None]:
    """A context in which nobody else trains in the directory. The lock ends with the process,
    however that ends. Machines that share a file system without locks do not see it.

    field: the option that named the directory, for messages.
    mark: a directory that holds files but not this one belongs to something else.

    Raises UserError where another process has the lock.
    """
    where = f"{field} is {str(directory)!r}"
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{where}: a file is in the way")
    with _or_cannot_write(directory, field):
        directory.mkdir(parents=True, exist_ok=True)
        foreign = [path for path in directory.iterdir() if path.name != LOCK]
        ours = not foreign or (directory / mark).is_file()
        file = (directory / LOCK).open("a+") if ours else None
    if file is None:
        yield  # not a run's: `claim_directory` says so
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{where}: process {file.read().strip() or '?'} is training there; wait for it, "
                "or choose another directory"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def keep_date(config: Config, directory: Path) -> Config:
    """The config with the date on which this run began, where it names none itself: what a chat
    template writes for today must be the same when a run goes on tomorrow."""
    if config.prompts.date is not None:
        return config
    date = datetime.date.today().isoformat()
    try:
        saved = read_yaml(directory / CONFIG)
        date = saved["prompts"]["date"] or date
        datetime.date.fromisoformat(date)
    except (UserError, OSError, LookupError, TypeError):
        pass  # no run yet, or of before dates were kept
    except ValueError:
        file = directory / CONFIG
        raise UserError(f"{str(file)!r} has prompts.date {date!r}, which is no date") from None
    prompts = config.prompts.model_copy(update={"date": date})
    return config.model_copy(update={"prompts": prompts})


def claim_directory(directory: Path, config: Config, resume: bool) -> Path | None:
    """Make the run's directory, or check that it is this run's; returns its last checkpoint.

    Removes what an interrupted run has half written. Raises UserError when the directory belongs to
    another run, or to something else.
    """
    mine = directory / CONFIG
    if directory.exists() and not directory.is_dir():
        raise UserError(f"output.dir is {str(directory)!r}: a file is in the way")
    # With a config alone nothing has run yet: an error in the data or the model came first.
    problems = directory / PROBLEMS
    nothing = {mine, problems, directory / LOCK}
    there = list(directory.iterdir()) if directory.exists() else []
    if any(path not in nothing and not is_unfinished(path) for path in there):
        if not mine.is_file():
            raise UserError(
                f"output.dir is {str(directory)!r}: it holds files that are not a run's; "
                "choose another"
            )
        changed = _changed(mine, config)
        if changed:
            raise UserError(
                f"output.dir is {str(directory)!r}: it belongs to a run with another config "
                f"({'; '.join(changed)}); choose another directory"
            )
        if not resume:
            raise UserError(
                f"output.dir is {str(directory)!r}: this run has been started before; go on "
                "with --resume, or choose another directory"
            )
        for left in directory.glob("*.part"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    with _or_cannot_write(directory):
        directory.mkdir(parents=True, exist_ok=True)
        save_config(config, mine)
    return last_checkpoint(directory)


@contextmanager
def _or_cannot_write(directory: Path, field: str = "output.dir") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{field} is {str(directory)!r}: cannot write there ({error.strerror})"
        ) from None


def checkpoints_in(directory: Path) -> list[Path]:
    """A run's checkpoints, oldest first. Their last file is trainer_state.json."""
    found = directory.glob("checkpoint-*/trainer_state.json")
    return sorted((file.parent for file in found), key=step_of)


def step_of(checkpoint: Path | None) -> int:
    """The step a checkpoint was written at; 0 without one."""
    return int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written to the end, or None. Raises UserError where it has
    been damaged since."""
    last = max(checkpoints_in(directory), key=step_of, default=None)
    if last is not None:
        with or_unreadable(last):
            json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    return last


def check_problems(
    directory: Path, rows: Mapping[str, Sequence[Row]], checkpoint: Path | None
) -> None:
    """Write down a digest of the run's problems; on resume, compare with it.

    rows: the config field that names their source → the rows.

    Raises UserError where a file or a dataset has changed since: the run would go on as another.
    """
    file = directory / PROBLEMS
    here = {field: {"rows": len(of), "sha256": _digest(of)} for field, of in rows.items()}
    if checkpoint is not None and file.is_file():
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
            before = {field: there[field]["rows"] for field in here}
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{str(file)!r} cannot be read; without that file the run goes on with whatever "
                "problems there are now"
            ) from None
        for field, now in here.items():
            if there[field] != now:
                raise UserError(
                    f"{field}: the problems are not those that the run in {str(directory)!r} began "
                    f"with ({before[field]} rows then, {now['rows']} now); restore them, or "
                    "begin another run in another output.dir"
                )
        return
    with _or_cannot_write(directory):
        write_json(file, here)


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.problem, row.solution, row.answer)).encode())
    return digest.hexdigest()


@contextmanager
def or_unreadable(checkpoint: Path) -> Iterator[None]:
    """A context that reads a checkpoint, which holds tensors and numbers only. Raises UserError
    where a file holds anything else, or is cut off."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"output.dir: {str(checkpoint)!r} cannot be read ({in_short(error)}); without that "
            "directory, --resume goes on from the checkpoint before"
        ) from error


def _changed(path: Path, config: Config) -> list[str]:
    """The fields that may not change on resume but differ from the file's, with both values."""
    try:
        there = _flat(load_config(path).model_dump())
    except UserError:
        return [f"{path.name} there cannot be read"]
    here = _flat(config.model_dump())
    free = MAY_CHANGE + (("train.steps",) if config.train.schedule == "constant" else ())
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
    """Nested dictionaries as one, of dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found

"""Saves a run elsewhere when its own directory can no longer be written."""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from opsd.common.errors import UserError
from opsd.common.files import remove, write_file
from opsd.config.config import Config
from opsd.config.load import save_config
from opsd.runs.directory import CONFIG, PROBLEMS
from opsd.runs.log import RunLog


def keep_elsewhere(
    config: Config, log: RunLog, needed: int, write: Callable[[Path], object]
) -> Path | None:
    """Make a new directory with the run's config and log, and let `write` add to it. Tries the
    temporary directory, then the user's cache; returns None if neither has room."""
    for parent in (Path(tempfile.gettempdir()), Path(os.path.expanduser("~/.cache"))):
        with suppress(OSError, UserError):
            if shutil.disk_usage(parent).free < needed:
                continue
            place = Path(tempfile.mkdtemp(prefix="opsd-run-", dir=parent))
            try:
                log.copy_to(place)
                problems = Path(config.output.dir) / PROBLEMS
                if problems.is_file():
                    write_file(place / PROBLEMS, problems.read_bytes())
                output = config.output.model_copy(update={"dir": str(place)})
                save_config(config.model_copy(update={"output": output}), place / CONFIG)
                write(place)
            except BaseException:
                remove(place)
                raise
            return place
    return None

"""What can be said of a command within a second: files, columns, models that are not there.

Nothing here needs torch, which takes ten seconds to import on a slow machine.
"""

import atexit
import gc
import os
from pathlib import Path

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.near import near_file, near_model
from opsd.common.urls import is_address
from opsd.config.config import Config
from opsd.config.load import load_config
from opsd.config.requirements import is_graded
from opsd.grading.rewards import check_code
from opsd.runs.directory import CONFIG
from opsd.training.load_data import first_rows

MODELS = ("config.json", "adapter_config.json")


def import_torch(display: Display) -> None:
    """Import what takes long, under a line that says so."""
    with display.stage("Start torch and transformers"):
        from opsd.models.load import quiet_transformers

        quiet_transformers()
    gc.freeze()  # what was imported is a million objects, which no collection need look through
    atexit.register(gc.unfreeze)  # else triton 3.9 reports what it imported as leaked


def check_inputs(config: Config) -> None:
    """Raises UserError for local files that are not there, and for columns that they lack."""
    if config.model.gguf_file is None:
        check_model(config.model.path, "model.path")
    teacher = config.teacher
    elsewhere = teacher.path is None or is_address(teacher.path)
    if not elsewhere and teacher.gguf_file is None:
        check_model(teacher.path, "teacher.path")
    first_rows(config)
    check_code(config.loss, is_graded(config), run=False)


def check_model(name: str, field: str) -> None:
    """Raises UserError for a local path that is no model."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        known = any((path / file).is_file() for file in MODELS) or any(path.glob("*.gguf"))
        if not known:
            raise UserError(
                f"{field} is {name!r}: a directory without config.json{near_model(path)}"
            )
    elif path.exists():
        raise UserError(f"{field} is {name!r}: a file; it must be a directory, or a hub name")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:  # no name of the hub
        raise UserError(f"{field} is {name!r}: there is no such directory{near_file(path)}")


def of_run(name: str) -> tuple[str, Config | None]:
    """A model's path, and the config of the run whose directory `name` is, if it is one."""
    path = Path(name)
    if any((path / file).is_file() for file in MODELS) or not (path / CONFIG).is_file():
        return name, None
    inside = [one for one in (path / "model", path / "best" / "model") if one.is_dir()]
    if not inside:
        raise UserError(f"MODEL is {name!r}: a run that has saved no model yet")
    return str(inside[0]), load_config(path / CONFIG)

"""Checks that take less than a second: missing files, columns and models.

They run before torch is imported, which takes ten seconds on a slow machine.
"""

import atexit
import gc
import os
import re
from importlib import import_module
from pathlib import Path

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.hub_offline import why_absent
from opsd.common.near import near_file, near_hub, near_model
from opsd.common.strict_json import read_object
from opsd.common.system import may_have_gpu
from opsd.common.urls import is_address
from opsd.config.compatibility import check_without_gpu
from opsd.config.config import Config
from opsd.config.load import load_config
from opsd.config.names import METHODS
from opsd.config.requirements import check_packages, is_graded
from opsd.data.sources import check_on_hub
from opsd.grading.rewards import check_code
from opsd.models.directory_check import check_files
from opsd.quickstart.settings import ARGUMENTS
from opsd.runs.directory import CONFIG, check_claim, check_goes_on, is_done, locked, settle
from opsd.training.load_data import look_at_rows, sources

HUB_NAME = r"[\w-][\w.-]*(/[\w.-]+)?"
MODELS = ("config.json", "adapter_config.json")


def import_torch(display: Display, module: str = "opsd.models.load") -> None:
    """Imports torch and transformers, by a module that needs them, while the display says so: it
    can take ten seconds."""
    gc.disable()  # nothing of what is imported is garbage, and collections take a fifth of the time
    try:
        with display.stage("Start torch and transformers"):
            import_module(module)
            import_module("opsd.models.load").quiet_transformers()
    finally:
        gc.enable()
    gc.freeze()  # the imports made a million objects: spare each collection from scanning them
    atexit.register(gc.unfreeze)  # else triton 3.9 reports its imported objects as leaked


def check_inputs(config: Config, hub: bool = True, here: bool = True) -> None:
    """Raises UserError for a local file that is missing, or that lacks a column; if `hub`, for a
    model or a dataset that the hub lacks, too; if `here`, for a package that this machine lacks."""
    if here:
        check_packages(config, "anywhere")
        if not may_have_gpu():
            check_without_gpu(config)
    named = []
    for name, own in (("model", config.model), ("teacher", config.teacher)):
        served = name == "teacher" and is_address(own.path)
        if own.path is not None and own.gguf_file is None and not served:
            named.append((own.path, f"{name}.path", own.revision))
            check_model(own.path, f"{name}.path")
    check_code(config.loss, is_graded(config), run=False)
    look_at_rows(config)
    read = [(one.source, one.options, "data") for one in sources(config.data)]
    if config.eval.source and config.eval.problems:
        read.append((config.eval.source, config.eval.options or {}, "eval"))
    if hub:
        for model in named:
            check_hub(*model)
        for dataset in read:
            check_on_hub(*dataset)


def check_output(config: Config, resume: bool, start_over: bool) -> None:
    """Raises UserError for a directory that is not for this run: see `check_claim`."""
    directory = Path(config.output.dir)
    if directory.exists():
        with locked(directory):
            check_claim(directory, settle(config, directory, "fp32"), resume)
            if not start_over and not is_done(directory, config):
                check_goes_on(directory)


def check_model(name: str, field: str, hub: bool = False) -> None:
    """Raises UserError for a local path that holds no model, and if `hub`, as `check_hub` does."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        check_files(path, f"{field} is {name!r}")
        adapter, key = path / MODELS[1], "base_model_name_or_path"
        base = adapter.is_file() and read_object(adapter, f"{field} is {name!r}").get(key)
        if base and isinstance(base, str) and not os.path.exists(os.path.expanduser(base)):
            check_model(base, f"{field} is {name!r}: {key} in its {adapter.name}")
        known = any((path / file).is_file() for file in MODELS) or any(path.glob("*.gguf"))
        if not known:
            raise UserError(
                f"{field} is {name!r}: a directory without config.json{near_model(path)}"
            )
    elif path.exists():
        within = any((path.parent / file).is_file() for file in MODELS)
        hint = f"; did you mean {str(path.parent)!r}?" if within else ""
        if path.suffix == ".gguf" and "." in field:
            section = field.partition(".")[0]
            hint = f"; write {field}={path.parent} {section}.gguf_file={path.name}"
        raise UserError(f"{field} is {name!r}: a file; it must be a directory, or a hub name{hint}")
    elif (path.parent / CONFIG).is_file():  # in a run's directory
        raise UserError(f"{field} is {name!r}: no such directory{near_model(path.parent)}")
    elif not re.fullmatch(HUB_NAME, name) or ("/" in name and [*path.parent.glob(f"*/{CONFIG}")]):
        ours = "; `opsd quickstart` makes it" if path.parts[:2] == ("runs", "quickstart") else ""
        hint = ours or near_file(path) or near_hub(name)
        if field == "teacher.path" and re.fullmatch(r"[\w.-]+:\d+", name):  # a server's
            hint = f"; did you mean 'http://{name}'?"
        raise UserError(f"{field} is {name!r}: there is no such directory{hint}")
    elif hub:
        check_hub(name, field)


def check_hub(name: str, field: str, revision: str | None = None) -> None:
    """Raises UserError for a hub name that is certainly not there; see `why_absent`."""
    if not os.path.exists(os.path.expanduser(name)) and (said := why_absent(name, revision)):
        raise UserError(
            f"{field} is {name!r}: neither a model directory nor a hub model that can be reached "
            f"({said}){near_file(name) or near_hub(name)}"
        )


def of_run(name: str) -> tuple[str, Config | None]:
    """If `name` is a run's directory, returns its model's path and its config; else name, None."""
    path = Path(name)
    runs = [path / method for method in METHODS if (path / method / CONFIG).is_file()]
    if runs and (path / ARGUMENTS).is_file():
        said = f"a quickstart, with a run for each method; did you mean {str(runs[0])!r}?"
        raise UserError(f"MODEL is {name!r}: {said}")
    if any((path / file).is_file() for file in MODELS) or not (path / CONFIG).is_file():
        return name, None
    inside = [one for one in (path / "model", path / "best" / "model") if one.is_dir()]
    if not inside:
        raise UserError(f"MODEL is {name!r}: a run that has saved no model yet{near_model(path)}")
    return str(inside[0]), load_config(path / CONFIG)

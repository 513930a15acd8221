"""Run a study: all runs that a comparison needs, several at a time.

A study file asks for quickstarts: each method with each seed, each number of worked solutions and
each style of them. Configs ask for `opsd train`: each config with each seed. Finished runs are kept
and interrupted ones are resumed, so an interrupted study continues where it stopped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from opsd.common.display import Display
from opsd.common.ending import PARENT
from opsd.common.errors import UserError
from opsd.common.files import append_to
from opsd.common.system import usable_cores
from opsd.config.base import Section
from opsd.config.config import Config
from opsd.config.explain import explain_all
from opsd.config.load import load_config
from opsd.config.names import Method
from opsd.config.yaml import read_yaml
from opsd.data.solution_styles import SolutionStyle
from opsd.runs.directory import LOCK, check_claim, is_done, locked, settle
from opsd.runs.records import Anything, read_record


class Study(Section):
    """The content of a study file."""

    quickstart: Literal["tiny", "smollm2"] = Field(
        description="The quickstart whose task, model and settings are used."
    )
    methods: list[Method] = Field(
        ["opsd", "grpo", "sft"], min_length=1, description="The methods to compare."
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="A run of every method each.")
    solutions: list[int | Literal["endless"]] = Field(
        ["endless"], min_length=1, description="Numbers of worked solutions to learn from."
    )
    solution_styles: list[SolutionStyle] = Field(
        ["words"], min_length=1, description="smollm2: how they are written."
    )
    problems: int | None = Field(None, ge=1, description="Held-out problems; none: quickstart's.")
    steps: int | None = Field(None, ge=1, description="Cut each method short, for a try.")
    threads: int = Field(
        1, ge=1, description="Threads of a run; as many runs go side by side as the cores allow."
    )
    baseline: str | None = Field(None, description="What the others' tokens are compared with.")
    settings: dict[str, Any] = Field(
        {}, description="Sections of `opsd train`'s config, a method's own below its name."
    )
    variants: dict[str, dict[str, Any]] = Field(
        {}, description="Name → settings of its own, instead of numbers of solutions and styles."
    )

    @field_validator("methods", "seeds", "solutions", "solution_styles")
    @classmethod
    def _sensible(cls, values: list, info: ValidationInfo) -> list:
        if len(set(values)) != len(values):
            raise ValueError("each may be named once")
        if info.field_name == "seeds" and min(values) < 0:
            raise ValueError("seeds must be at least 0")
        if info.field_name == "solutions" and any(n != "endless" and n < 1 for n in values):
            raise ValueError("there must be at least 1 solution")
        return values

    @field_validator("variants")
    @classmethod
    def _directories(cls, variants: dict) -> dict:
        if any(name != Path(name).name or name.startswith(".") for name in variants):
            raise ValueError("a name becomes a directory's: no slash, and no dot in front")
        return variants

    @property
    def cells(self) -> list[Cell]:
        """The variants, or every pair of a number of solutions and a style, each with each seed."""
        if self.variants:
            count, style = self.solutions[0], self.solution_styles[0]
            return [Cell(name, count, style, own) for name, own in self.variants.items()]
        return [
            Cell(f"{count}-{style}", count, style)
            for style in self.solution_styles
            for count in self.solutions
        ]


@dataclass(frozen=True)
class Cell:
    """The settings of a row of the study's table; `name` is also its directory."""

    name: str
    solutions: int | Literal["endless"]
    solution_style: SolutionStyle
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A run to start: arguments of `opsd`, and its config, or a quickstart's methods."""

    directory: Path
    arguments: list[str]
    config: Config | None = None
    methods: Sequence[str] = ()

    @property
    def finished(self) -> bool:
        """Whether its summary exists, and each method's; a config's run must also be as long."""
        if self.config is not None:
            return is_done(self.directory, self.config)
        return all((self.directory / one / "summary.json").is_file() for one in ("", *self.methods))

    @property
    def command(self) -> list[str]:
        """The arguments, with --resume if an interrupted run has left a directory."""
        if not self.directory.exists():
            return self.arguments
        anew = ["--start-over"] if self.arguments[0] == "train" else []
        return [*self.arguments, "--resume", *anew]


def load_study(path: Path) -> Study:
    """Read a study file. Raises UserError if it is not YAML or has unknown keys or wrong values."""
    try:
        study = Study.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(explain_all(error, Study)) from None
    if study.quickstart == "tiny" and study.solution_styles != ["words"]:
        raise UserError(
            f"solution_styles is {study.solution_styles}: the tiny worksheets have only one style"
        )
    if study.variants and (len(study.solutions), len(study.solution_styles)) != (1, 1):
        raise UserError("variants: they go with one number of solutions and one style")
    return study


def study_jobs(study: Study, output: Path) -> dict[str, list[Job]]:
    """The name of each cell → its runs, one per seed with all methods, in `output`/cell/seed-n."""
    kind = ["--tiny"] if study.quickstart == "tiny" else []
    jobs: dict[str, list[Job]] = {}
    for cell in study.cells:
        count = None if cell.solutions == "endless" else cell.solutions
        asked: dict[str, Any] = {"solutions": count, "solution_style": cell.solution_style}
        asked |= {"problems": study.problems, "steps": study.steps}
        named = {key.replace("_", "-"): value for key, value in asked.items()}
        options = [
            f"--{key}={value}" for key, value in named.items() if value not in (None, "words")
        ]
        options += asked.setdefault("overrides", overrides(study, cell))
        for seed in study.seeds:
            directory = output / cell.name / f"seed-{seed}"
            file = directory / "quickstart.json"
            kept = read_record(file, Anything).record if file.is_file() else asked
            for name, now in asked.items():
                if (was := kept.get(name)) != now:
                    said = f"{str(directory)!r} was begun with {name} {was!r}, not {now!r}"
                    raise UserError(f"--output: {said}; choose another directory")
            arguments = ["quickstart", *kind, "--methods", ",".join(study.methods)]
            arguments += ["--seed", str(seed), "--output", str(directory), *options]
            jobs.setdefault(cell.name, []).append(Job(directory, arguments, None, study.methods))
    return jobs


def overrides(study: Study, cell: Cell) -> list[str]:
    """The settings of the study, then of the cell, as `[method.]section.field=value`."""
    return [*_flat(study.settings), *_flat(cell.settings)]


def _flat(settings: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}={json.dumps(value)}"


def train_jobs(
    configs: Sequence[Path], seeds: Sequence[int], output: Path, tokens: int | None = None
) -> list[Job]:
    """The runs of `opsd train`: each config with each seed, in `output`/<config's name>-<seed>.

    Checks all configs first. tokens: each run's token_budget. Raises UserError.
    """
    if len({path.stem for path in configs}) != len(configs):
        raise UserError("CONFIG: two configs have the same name, and would share directories")
    jobs = []
    for path in configs:
        for seed in seeds:
            directory = output / f"{path.stem}-{seed}"
            own = [f"train.seed={seed}", f"output.dir={directory}"]
            own += [] if tokens is None else [f"train.token_budget={tokens}"]
            try:
                config = load_config(path, own)
                check_claim(directory, settle(config, directory, "auto"), resume=True)
            except UserError as error:  # add the config's path if the error does not name it
                said = str(error) if str(path) in str(error) else f"{path}: {error}"
                raise UserError(said) from None
            jobs.append(Job(directory, ["train", str(path), *own], config))
    return jobs


def run_jobs(
    jobs: Sequence[Job], display: Display, threads: int = 1, gpus: Sequence[str] = ()
) -> None:
    """Run the unfinished jobs: one on each of `gpus`, or without GPUs cores // threads at a time.

    A run's output goes to <directory>.log. Every run has the same number of threads, so its results
    do not depend on the number of cores. If a run fails, the runs in progress may finish; then a
    UserError names the log. All runs end when this process ends, in whatever way.
    """
    waiting = [job for job in jobs if not job.finished]
    for job in waiting:
        if (job.directory / LOCK).exists():  # a run of a killed study may still be saving: wait
            with locked(job.directory, "--output", LOCK):
                pass
        job.directory.parent.mkdir(parents=True, exist_ok=True)
    free: list[str | None] = list(gpus) or [None] * max(1, usable_cores() // threads)
    running: dict[subprocess.Popen, tuple[Job, str | None]] = {}
    failed: Job | None = None
    title = f"Run the study, {len(free)} at a time"
    watched, ours = os.pipe()  # the runs end when `ours` closes
    with display.stage(title, total=len(jobs)) as stage:
        stage.update(completed=len(jobs) - len(waiting))
        try:
            while waiting or running:
                while waiting and free and failed is None:
                    job, gpu = waiting.pop(0), free.pop(0)
                    running[_start(job, threads, watched, gpu)] = job, gpu
                    stage.phase(f"{log_of(job)} for")  # its time follows: "runs/a.log for 25 s"
                for process in [process for process in running if process.poll() is not None]:
                    job, gpu = running.pop(process)
                    free.append(gpu)
                    if process.returncode or not job.finished:
                        failed, waiting = job, []
                    else:
                        stage.advance(1)
                time.sleep(0.1)
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
            os.close(watched)
            os.close(ours)
    if failed is not None:
        raise UserError(f"{failed.directory}: the run failed; see {log_of(failed)}")


def log_of(job: Job) -> Path:
    """The file for a run's terminal output."""
    return job.directory.with_name(job.directory.name + ".log")


def _start(job: Job, threads: int, watched: int, gpu: str | None = None) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), PARENT: str(watched)}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with append_to(log_of(job)) as log:
        return subprocess.Popen(
            [sys.executable, "-m", "opsd", *job.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[watched],
        )

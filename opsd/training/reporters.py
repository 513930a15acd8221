"""Reports evaluations and completions to W&B, TensorBoard, trackio, MLflow and Comet.

transformers' callbacks report the steps. The loggers stay open until the last evaluation.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler

from opsd.config.sections import OutputSection

COLUMNS = ("step", "problem", "answer", "completion", "correct")
SHOWN = 20  # completions reported with an evaluation


class Reports(TrainerCallback):
    """The loggers of output.report_to, which also get the evaluations. held: the loggers stay open
    when training ends, until `close`."""

    def __init__(self, section: OutputSection, held: bool = False):
        self.tags, self.held = section.tags, held
        environment = {
            "WANDB_PROJECT": section.project,
            "WANDB_TAGS": ",".join(section.tags),
            "MLFLOW_EXPERIMENT_NAME": section.project,
            "MLFLOW_TAGS": json.dumps(dict.fromkeys(section.tags, "true")),
            "COMET_PROJECT_NAME": section.project,
        }
        for name, value in environment.items() if section.report_to else ():
            os.environ.setdefault(name, value)
        kinds = get_reporting_integration_callbacks([*map(str, section.report_to)])
        self.loggers: list[Any] = [kind() for kind in kinds]
        self._begun: tuple[tuple, dict] | None = None
        self._waiting: list[tuple[dict, list]] = []  # evaluations from before training

    def on_train_begin(self, *where: Any, **more: Any) -> None:
        self._begun = where, {"model": more.get("model")}
        for logger in self.loggers:
            if self.tags and (comet := getattr(logger, "_experiment", None)):
                comet.add_tags(self.tags)
        for record, rows in self._waiting:
            self.evaluation(record, rows)

    def evaluation(self, record: dict, rows: list[Sequence[Any]]) -> None:
        """Report an evaluation's line, and rows of its completions with COLUMNS."""
        if self._begun is None:
            self._waiting.append((record, rows))
            return
        where, more = self._begun
        role = "" if record["role"] == "student" else f"{record['role']}_"
        prefix, name = f"eval_{role}", f"{role}completions"
        numbers = {prefix + k: v for k, v in record.items() if isinstance(v, int | float)}
        for logger in self.loggers:
            logger.on_log(*where, logs=dict(numbers), **more)
            if where[1].is_world_process_zero:
                log_table(logger, rows[:SHOWN], record["step"], name)

    def hold(self, handler: CallbackHandler) -> None:
        """Called when training ends: keep `handler` from closing the loggers."""
        for logger in self.loggers if self.held else ():
            handler.remove_callback(logger)

    def close(self) -> None:
        """Close the loggers: the run has ended."""
        where, more = self._begun or ((), {})
        for logger in self.loggers if where else ():
            logger.on_train_end(*where, **more)


def log_table(logger: Any, rows: list[Sequence[Any]], step: int, name: str) -> None:
    """Log rows of COLUMNS as a table, with the function that each logger has for it. MLflow gets a
    file a step: to append to one it reads it, and makes a number of a text that looks like one."""
    columns = {column: [row[i] for row in rows] for i, column in enumerate(COLUMNS)}
    if wandb := getattr(logger, "_wandb", None):
        table = wandb.Table(columns=[*COLUMNS], data=[list(row) for row in rows])
        wandb.log({name: table, "train/global_step": step})
    elif trackio := getattr(logger, "_trackio", None):
        from pandas import DataFrame

        table = trackio.Table(dataframe=DataFrame(columns))
        trackio.log({name: table, "train/global_step": step})
    elif mlflow := getattr(logger, "_ml_flow", None):
        mlflow.log_table(columns, artifact_file=f"{name}-{step}.json")
    elif comet := getattr(logger, "_experiment", None):
        comet.log_table(f"{name}-{step}.csv", rows, headers=[*COLUMNS])
    elif board := getattr(logger, "tb_writer", None):
        cells = [[str(v).replace("|", "\\|").replace("\n", "<br>") for v in row] for row in rows]
        text = "\n".join(f"| {' | '.join(row)} |" for row in cells)
        head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
        board.add_text(name, head + text, step)

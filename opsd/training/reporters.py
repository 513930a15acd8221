"""W&B, TensorBoard, trackio, MLflow and Comet, by transformers' callbacks: steps, evaluations and
tables of completions. They stay open until the run's last evaluation, which follows the training.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from opsd.config.sections import OutputSection

COLUMNS = ("step", "problem", "answer", "completion", "correct")
SHOWN = 20  # completions of an evaluation


class Reporters(TrainerCallback):
    """Hands Trainer's events on to each of output.report_to.

    held: training's end is not the run's end; `close` is.
    """

    def __init__(self, section: OutputSection, held: bool = False):
        self.tags, self.held = section.tags, held
        environment = {
            "WANDB_PROJECT": section.project,
            "WANDB_TAGS": ",".join(section.tags),
            "MLFLOW_EXPERIMENT_NAME": section.project,
            "MLFLOW_TAGS": json.dumps(dict.fromkeys(section.tags, "true")),
            "COMET_PROJECT_NAME": section.project,
        }
        if section.report_to:
            for name, value in environment.items():
                os.environ.setdefault(name, value)
        kinds = get_reporting_integration_callbacks([*map(str, section.report_to)])
        self.loggers: dict[str, Any] = {
            name: kind() for name, kind in zip(section.report_to, kinds, strict=True)
        }
        self._begun: tuple[tuple, dict] | None = None
        self._waiting: list[tuple[dict, list]] = []  # evaluations of before the training began

    def on_init_end(self, *where: Any, **more: Any) -> None:
        self._each("on_init_end", where, more)

    def on_train_begin(self, *where: Any, **more: Any) -> None:
        self._begun = where, more
        self._each("on_train_begin", where, more)
        if self.tags and (comet := getattr(self.loggers.get("comet_ml"), "_experiment", None)):
            comet.add_tags(self.tags)
        for record, rows in self._waiting:
            self.evaluation(record, rows)

    def on_log(self, *where: Any, **more: Any) -> None:
        self._each("on_log", where, more)

    def on_save(self, *where: Any, **more: Any) -> None:
        self._each("on_save", where, more)

    def on_train_end(self, *where: Any, **more: Any) -> None:
        if not self.held:
            self.close()

    def evaluation(self, record: dict, rows: list[Sequence[Any]]) -> None:
        """An evaluation's line, and its completions in COLUMNS."""
        if self._begun is None:
            self._waiting.append((record, rows))
            return
        (arguments, state, control), more = self._begun
        if not self.loggers or not state.is_world_process_zero:
            return
        prefix = "eval_" if record["role"] == "student" else f"eval_{record['role']}_"
        numbers = {prefix + k: v for k, v in record.items() if isinstance(v, int | float)}
        self._each("on_log", (arguments, state, control), {**more, "logs": numbers})
        for name, logger in self.loggers.items():
            _table(name, logger, rows[:SHOWN], record["step"])

    def close(self) -> None:
        """The run has ended."""
        begun, self._begun = self._begun, None
        if begun is not None:
            self._each("on_train_end", *begun)

    def _each(self, event: str, where: tuple, more: dict) -> None:
        for logger in self.loggers.values():
            getattr(logger, event)(*where, **more)


def _table(name: str, logger: Any, rows: list[Sequence[Any]], step: int) -> None:
    """Log rows of COLUMNS as a table, as each of the loggers has one."""
    columns = {column: [row[i] for row in rows] for i, column in enumerate(COLUMNS)}
    if name == "wandb":
        table = logger._wandb.Table(columns=[*COLUMNS], data=[list(row) for row in rows])
        logger._wandb.log({"completions": table, "train/global_step": step})
    elif name == "trackio":
        import pandas

        table = logger._trackio.Table(dataframe=pandas.DataFrame(columns))
        logger._trackio.log({"completions": table, "train/global_step": step})
    elif name == "mlflow":
        logger._ml_flow.log_table(columns, artifact_file="completions.json")
    elif name == "comet_ml":
        logger._experiment.log_table(f"completions-{step}.csv", rows, headers=[*COLUMNS])
    else:
        text = "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)
        head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
        logger.tb_writer.add_text("completions", head + text, step)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")

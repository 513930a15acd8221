"""A step's line in metrics.jsonl: what it spent, what it measured, and whether the run is over."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opsd.config.sections import TrainSection
from opsd.objectives import Problem, Totals
from opsd.runs.log import RunLog
from opsd.training.collapse import CollapseWatch
from opsd.training.no_signal import NoSignalWatch


@dataclass
class StepLog:
    """Keeps a step's measures until its loss and norm are known, then writes its line."""

    method: str
    train: TrainSection
    generates: bool  # whether a model writes the rollouts, so that their tokens count as generated
    run_log: RunLog  # the run's files, and its counters, which go on from them
    on_step: Callable[[dict], None]  # called with each line, for the display
    note: Callable[[str], None]  # called with a line for the terminal

    def __post_init__(self):
        section, past = self.train.collapse, self.run_log.past
        self.collapse = CollapseWatch(section, past)
        self.no_signal = NoSignalWatch(0 if section.on == "off" else section.no_signal, past)
        self._measures: dict[str, Any] = {}

    def count(
        self,
        problems: Sequence[Problem],
        totals: Totals,
        measures: dict[str, float],
        seconds: float,
    ) -> None:
        """A step that is done but for its optimizer update. `problems` are those asked, with their
        rollouts; `totals` are its samples'; `measures` are what else was measured.
        """
        rollouts = [rollout for problem in problems for rollout in problem.rollouts]
        length = sum(len(rollout.ids) for rollout in rollouts)
        counters = self.run_log.counters
        if self.generates:
            counters.generated_tokens += length
        counters.trained_tokens += totals.tokens
        counters.seconds += seconds
        line = {"divergence": None, "student_entropy": None, **totals.means(), **measures}
        if rollouts:
            line["rollout_length"] = length / len(rollouts)
            line["truncated_fraction"] = sum(not r.finished for r in rollouts) / len(rollouts)
        else:
            line["rollout_length"] = totals.tokens / len(problems)
        line["tokens_per_second"] = totals.tokens / seconds
        self._measures = line

    def write(
        self, step: int, logs: dict[str, Any], seconds: Sequence[dict[str, float]], left_out: bool
    ) -> tuple[dict[str, float], bool]:
        """Writes the line of the step counted last.

        Args:
            logs: the loss, the gradient's norm, the learning rate.
            seconds: of each process, in each phase; the slowest is what the step takes.
            left_out: the step made no update, since something in it was not finite.

        Returns its numbers, for loggers (W&B, TensorBoard), and whether the run is over:
        its tokens or steps are spent, or it has collapsed.
        """
        if left_out:
            logs = {**logs, "loss": None, "grad_norm": None}
            self._measures["left_out"] = 1
        line = {
            "step": step,
            "method": self.method,
            **asdict(self.run_log.counters),
            **logs,
            **self._measures,
            **_most(seconds),
        }
        self._measures = {}
        collapsed = self._has_collapsed(line)
        self.run_log.metrics(line)
        self.on_step(line)
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        return numbers, collapsed or self.is_done(step)

    def is_done(self, step: int) -> bool:
        """Whether the run has spent its tokens or its steps."""
        counters, budget = self.run_log.counters, self.train.token_budget
        spent = counters.generated_tokens or counters.trained_tokens
        if budget is not None and spent >= budget:
            return True
        return step >= self.train.steps

    def _has_collapsed(self, line: dict[str, Any]) -> bool:
        """Says what has collapsed, in the line too; whether the run is to stop for it."""
        stops = self.train.collapse.on == "stop"
        end = "; stopping" if stops else ""
        collapsed, without_signal = self.collapse(line), self.no_signal(line)
        for name in (*collapsed, *without_signal):
            line["collapse"] = [*line.get("collapse", []), name]
        for said in collapsed.values():
            self.note(f"Step {line['step']}: collapse: {said}{end}")
        for said in without_signal.values():
            self.note(f"Step {line['step']}: {said}{end}")
        return stops and bool(collapsed or without_signal)


def _most(dictionaries: Sequence[dict[str, float]]) -> dict[str, float]:
    """The largest value of each key."""
    keys = dict.fromkeys(key for values in dictionaries for key in values)
    return {key: max(v[key] for v in dictionaries if key in v) for key in keys}

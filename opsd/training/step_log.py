"""Writes a step's line in metrics.jsonl, and decides whether the run is over."""

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
    """Keeps a step's measures until its loss and gradient norm are known, then writes its line."""

    method: str
    train: TrainSection
    generates: bool  # a model writes the rollouts, so their tokens count as generated
    run_log: RunLog  # the run's files and counters
    on_step: Callable[[dict], None]  # called with each line, for the display
    note: Callable[[str], None]  # shows a line in the terminal

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
        """Count a step whose optimizer update is still to come. `problems`: those sampled, with
        their rollouts; `totals`: the measures of the step's samples; `measures`: all others."""
        rollouts = [rollout for problem in problems for rollout in problem.rollouts]
        length = sum(len(rollout.ids) for rollout in rollouts)
        counters = self.run_log.counters
        if self.generates:
            counters.generated_tokens += length
        counters.trained_tokens += totals.trained
        counters.seconds += seconds
        line = {"divergence": None, "student_entropy": None, **totals.means(), **measures}
        if "sft" in totals.parts:
            line["sft_tokens"] = totals.parts["sft"].tokens
        if rollouts:
            line["rollout_length"] = length / len(rollouts)
            line["truncated_fraction"] = sum(not r.finished for r in rollouts) / len(rollouts)
        else:
            line["rollout_length"] = totals.tokens / len(problems)
        line["tokens_per_second"] = totals.trained / seconds
        self._measures = line

    def write(
        self, step: int, logs: dict[str, Any], seconds: Sequence[dict[str, float]], left_out: bool
    ) -> tuple[dict[str, float], bool]:
        """Write the line of the step that was counted last.

        Args:
            logs: the loss, the gradient's norm, the learning rate.
            seconds: each process's seconds in each phase; the line has the slowest's.
            left_out: the step made no update because something in it was not finite.

        Returns its numbers, for loggers (W&B, TensorBoard), and whether the run is over: its tokens
        or steps are used up, or it has collapsed.
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
        """Whether the run has used up its tokens or its steps."""
        counters, budget = self.run_log.counters, self.train.token_budget
        spent = counters.generated_tokens or counters.trained_tokens
        return step >= self.train.steps or (budget is not None and spent >= budget)

    def _has_collapsed(self, line: dict[str, Any]) -> bool:
        """Report a collapse, also in the metrics line. Returns whether to stop the run."""
        stops = self.train.collapse.on == "stop"
        collapsed = {name: f"collapse: {said}" for name, said in self.collapse(line).items()}
        found = collapsed | self.no_signal(line)
        for name, said in found.items():
            line["collapse"] = [*line.get("collapse", []), name]
            self.note(f"Step {line['step']}: {said}{'; stopping' if stops else ''}")
        return stops and bool(found)


def _most(dictionaries: Sequence[dict[str, float]]) -> dict[str, float]:
    """The largest value of each key."""
    keys = dict.fromkeys(key for values in dictionaries for key in values)
    return {key: max(v[key] for v in dictionaries if key in v) for key in keys}

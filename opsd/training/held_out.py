"""Samples answers to held-out problems and grades them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import PreTrainedModel

from opsd.common.display import Display
from opsd.common.format import percent
from opsd.common.statistics import wilson_interval
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.data.thoughts import final_part
from opsd.distributed.processes import Processes
from opsd.grading.completions import completions
from opsd.grading.grader import Grade, Grader
from opsd.models.load import stop_ids
from opsd.rollout import SAMPLERS, DistributedSampler, Rollout, Sampler, Sampling, described


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation: one answer to each held-out problem."""

    rollouts: list[Rollout]
    completions: list[str]
    grades: list[Grade]
    seconds: float
    sampling: dict  # the engine and its sampling settings

    @property
    def accuracy(self) -> float:
        """The share of correct answers. A cut-off answer is graded as far as it goes."""
        return sum(grade.correct for grade in self.grades) / len(self.grades)

    def record(self) -> dict:
        """The line for evaluations.jsonl, without step and token counts."""
        n = len(self.grades)
        low, high = wilson_interval(self.accuracy * n, n)
        return {
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
            "problems": n,
            "samples": 1,
            "mean_length": sum(len(r.ids) for r in self.rollouts) / n,
            "truncated_fraction": sum(not r.finished for r in self.rollouts) / n,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class HeldOut:
    """The held-out problems with all that is needed to evaluate a model in either role."""

    rows: Sequence[Row]
    prompts: Prompts
    grader: Grader
    sampling: Sampling
    engine: str = "generate"
    processes: Processes | None = None

    def first(self, count: int | None) -> "HeldOut":
        """The same with the first `count` problems only; None: all."""
        return replace(self, rows=self.rows[:count])

    def evaluate(
        self,
        model: PreTrainedModel,
        display: Display,
        role: str = "student",
        name: str = "",
        sampler: Sampler | None = None,
    ) -> Evaluation:
        """Sample one answer to each problem from `model`, with `role`'s prompt, and grade it.

        name: the model's name, for the display.
        sampler: samples for the model; it must distribute the problems over processes. None: make
        one. The first process grades.
        """
        contexts = self.prompts.all_ids(self.rows, role)
        tokenizer, chat = self.prompts.tokenizer, self.prompts.chats[role]
        if sampler is None:
            sampler = SAMPLERS[self.engine](model, stop_ids(model, tokenizer))
            if self.processes is not None:
                sampler = DistributedSampler(sampler, self.processes)
        title = f"Evaluate the {name or role}"
        with display.stage(title, len(self.rows), "answers") as stage:
            start = time.monotonic()
            stage.phase("sampling")
            stage.most_tokens = len(self.rows) * self.sampling.max_new_tokens
            rollouts = sampler.sample(contexts, self.sampling, stage.count)
            stage.phase("grading")
            texts = completions(tokenizer, rollouts)
            parts = [final_part(text, chat.opens_thought) for text in texts]
            grade = partial(self.grader.grade, parts, [row.answer for row in self.rows])
            grades = grade() if self.processes is None else self.processes.once(grade)
            drawn = described(sampler, self.sampling)
            result = Evaluation(rollouts, texts, grades, time.monotonic() - start, drawn)
            low, high = (100 * result.record()[name] for name in ("low", "high"))
            spent = sum(len(rollout.ids) for rollout in rollouts)
            stage.update(
                accuracy=f"{percent(result.accuracy)} ({low:.1f} to {high:.1f})",
                tokens=spent,
                tokens_per_second=spent / max(result.seconds, 1e-9),
            )
        none = [(r, g.reason) for r, g in zip(rollouts, grades, strict=True) if g.extracted is None]
        if 2 * len(none) > len(grades):
            cut = sum(not rollout.finished for rollout, _ in none)
            said = f"{len(none)} of {len(grades)} answers score 0: {none[0][1]}"
            display.note(f"{said} ({cut} cut off at {self.sampling.max_new_tokens} tokens)")
        return result

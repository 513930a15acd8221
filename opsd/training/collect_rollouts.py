"""A step's problems: rows → contexts → rollouts → grades → what the teacher is shown of them."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.config.config import Config
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.distributed.processes import Processes
from opsd.grading.rewards import RewardFunction
from opsd.models.load import window
from opsd.objectives import Objective, Problem
from opsd.rollout import Rollout, Sampler, Sampling
from opsd.training.teacher_contexts import TeacherContexts, graded, informative, outcome_measures

SAMPLING = {"max_new_tokens", "temperature", "top_p", "top_k", "batch_size"}


class CollectedRollouts(NamedTuple):
    """All problems that were put to the student, those to learn from, and what is measured."""

    asked: list[Problem]
    chosen: list[Problem]
    measures: dict[str, float]


class RolloutCollector:
    """Makes a step's problems.

    Args:
        model: what trains; the sampler takes over its weights before each step.
        rows: the training rows, from which others are drawn under `rollout.dynamic_sampling`.
        teacher_sampler: samples from the teacher, for rollout.source teacher.
        reward_function: grades rollouts; None: nobody does.
        note: called with a line for the terminal, once.
        processes: sample together; the first one grades and draws.

    `how` says how rollouts are drawn, for the log.
    """

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel,
        rows: Sequence[Row],
        prompts: Prompts,
        objective: Objective,
        sampler: Sampler,
        teacher_sampler: Sampler | None,
        reward_function: RewardFunction | None,
        note: Callable[[str], None],
        processes: Processes,
    ):
        self.config, self.model, self.rows, self.prompts = config, model, rows, prompts
        self.objective, self.sampler, self.teacher_sampler = objective, sampler, teacher_sampler
        self.reward_function, self.processes = reward_function, processes
        self.sampling = Sampling(**config.rollout.model_dump(include=SAMPLING))
        self.teacher_contexts = TeacherContexts(
            prompts, window(model.config), config.prompts.too_long == "skip", note
        )
        source = config.rollout.source
        self.samples = objective.samples_rollouts and source != "reference"
        drawn_by = teacher_sampler if source == "teacher" else sampler
        self.how = {"source": source, "engine": drawn_by.engine, **asdict(self.sampling)}

    def __call__(self, rows: Sequence[Row]) -> CollectedRollouts:
        """The problems of a step that draws these rows."""
        if self.samples:
            with phase("rollout"):
                self.sampler.sync_weights(self.model)
        asked = self._asked(rows)
        chosen = asked
        if self.config.rollout.dynamic_sampling:
            asked, chosen = self._resampled(asked)
        measures = outcome_measures(asked)
        chosen, of_lessons = self.teacher_contexts(chosen)
        return CollectedRollouts(asked, chosen, measures | of_lessons)

    def _resampled(self, asked: list[Problem]) -> tuple[list[Problem], list[Problem]]:
        """Other problems for those whose rewards are all alike: all asked, and those that say
        something (all, if none does)."""
        chosen = [problem for problem in asked if informative(problem)]
        for _ in range(self.config.rollout.dynamic_sampling):
            missing = self.config.train.problems_per_step - len(chosen)
            if missing <= 0:
                break
            drawn = self.processes.once(
                lambda n=missing: torch.randint(len(self.rows), (n,)).tolist()
            )
            more = self._asked([self.rows[i] for i in drawn])
            asked = asked + more
            chosen += [problem for problem in more if informative(problem)]
        return asked, chosen or asked

    def _asked(self, rows: Sequence[Row]) -> list[Problem]:
        """The rows with their rollouts, graded."""
        contexts = self.prompts.contexts(rows)
        copies = self.config.rollout.group_size if self.objective.samples_rollouts else 0
        rollouts: list[Rollout] = []
        if self.samples:
            role, sampler = "student", self.sampler
            if self.config.rollout.source == "teacher":
                role, sampler = self.objective.teacher_role, self.teacher_sampler
            asked = [getattr(context, role) for context in contexts for _ in range(copies)]
            with phase("rollout"):
                rollouts = sampler.sample(asked, self.sampling)
        elif copies:
            copies = 1  # they would be alike
            rollouts = [Rollout(self.prompts.target(row), True) for row in rows]
        problems = [
            Problem(row, context, rollouts[i * copies : (i + 1) * copies])
            for i, (row, context) in enumerate(zip(rows, contexts, strict=True))
        ]
        with phase("grading"):
            return self.processes.once(lambda: graded(problems, self.reward_function))

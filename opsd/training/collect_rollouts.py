"""A step's problems: rows → contexts → rollouts → grades → teacher contexts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.config.sections import RolloutSection
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.distributed.processes import Processes
from opsd.grading.rewards import RewardFunction
from opsd.models.load import window
from opsd.objectives import Objective, Problem
from opsd.rollout import Rollout, Sampler, Sampling, described
from opsd.training.teacher_contexts import TeacherContexts, graded, informative, outcome_measures


class CollectedRollouts(NamedTuple):
    """All problems that were sampled, those of them to learn from, and measures for the log."""

    sampled: list[Problem]
    chosen: list[Problem]
    measures: dict[str, float]


@dataclass
class RolloutCollector:
    """Makes a step's problems.

    `how` says how rollouts are drawn, for the log.
    """

    section: RolloutSection  # `rollout`
    problems_per_step: int  # that are to be learnt from
    model: PreTrainedModel  # what trains; the sampler gets its weights before each step
    rows: Sequence[Row]  # the training rows, from which `rollout.dynamic_sampling` draws more
    prompts: Prompts
    objective: Objective
    sampler: Sampler
    teacher_sampler: Sampler | None  # samples from the teacher, for rollout.source teacher
    reward_function: RewardFunction | None  # grades rollouts; None: they are not graded
    note: Callable[[str], None]  # called once with a line for the terminal
    processes: Processes  # sample together; the first one grades and draws
    progress: Callable[[int, int], None] | None = None  # told of sequences and tokens

    def __post_init__(self):
        self.sampling, source = Sampling.of(self.section), self.section.source
        skips = self.prompts.section.too_long == "skip"
        longest = window(self.model.config)
        self.teacher_contexts = TeacherContexts(self.prompts, longest, skips, self.note)
        self.samples = self.objective.samples_rollouts and source != "reference"
        drawn_by = self.teacher_sampler if source == "teacher" else self.sampler
        self.how = {"source": source, **described(drawn_by, self.sampling)}

    def __call__(self, rows: Sequence[Row]) -> CollectedRollouts:
        """The problems of a step that draws these rows."""
        sync: dict[str, float] = {}
        if self.samples:
            with phase("rollout"):
                self.sampler.sync_weights(self.model)
            sync = getattr(self.sampler, "sync", {})
        sampled = self._sample(rows)
        chosen = sampled
        if self.section.dynamic_sampling:
            sampled, chosen = self._sample_more(sampled)
        measures = outcome_measures(sampled)
        chosen, measured = self.teacher_contexts(chosen)
        return CollectedRollouts(sampled, chosen, sync | measures | measured)

    def _sample_more(self, sampled: list[Problem]) -> tuple[list[Problem], list[Problem]]:
        """Draws other problems for those whose rewards are all equal.

        Returns all that were sampled, and those with differing rewards (or all, if there are none).
        """
        chosen = [problem for problem in sampled if informative(problem)]
        for _ in range(self.section.dynamic_sampling):
            missing = self.problems_per_step - len(chosen)
            if missing <= 0:
                break
            draw = partial(torch.randint, len(self.rows), (missing,))
            more = self._sample([self.rows[i] for i in self.processes.once(draw).tolist()])
            sampled = sampled + more
            chosen += [problem for problem in more if informative(problem)]
        return sampled, chosen or sampled

    def _sample(self, rows: Sequence[Row]) -> list[Problem]:
        """The rows with their rollouts, graded."""
        contexts = self.prompts.contexts(rows)
        copies = self.section.group_size if self.objective.samples_rollouts else 0
        rollouts: list[Rollout] = []
        if self.samples:
            role, sampler = "student", self.sampler
            if self.section.source == "teacher":
                role, sampler = self.objective.teacher_role, self.teacher_sampler
            prefixes = [context.of(role) for context in contexts for _ in range(copies)]
            with phase("rollout"):
                rollouts = sampler.sample(prefixes, self.sampling, self.progress)
        elif copies:
            copies = 1  # more would be equal
            rollouts = [Rollout(self.prompts.target(row), True) for row in rows]
        problems = [
            Problem(row, context, rollouts[i * copies : (i + 1) * copies])
            for i, (row, context) in enumerate(zip(rows, contexts, strict=True))
        ]
        with phase("grading"):
            return self.processes.once(lambda: graded(problems, self.reward_function))

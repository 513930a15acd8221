"""Makes a step's problems: rows → contexts → rollouts → grades → teacher contexts."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.config.sections import RolloutSection, TrainSection
from opsd.data.prompts import Context, Prompts
from opsd.data.rows import Row
from opsd.distributed.processes import Processes
from opsd.grading.rewards import RewardFunction
from opsd.models.load import window
from opsd.objectives import Objective, Problem
from opsd.rollout import (
    DistributedSampler,
    Rollout,
    RolloutsAhead,
    Sampler,
    Sampling,
    ServerRestartedError,
    described,
)
from opsd.training.teacher_contexts import TeacherContexts, graded, informative, outcome_measures


class CollectedRollouts(NamedTuple):
    """All problems that were sampled, those to train on, and measures for the log."""

    sampled: list[Problem]
    chosen: list[Problem]
    measures: dict[str, float]


@dataclass
class RolloutCollector:
    """Makes a step's problems.

    `how` describes the sampling, for the log.
    """

    section: RolloutSection  # `rollout`
    problems_per_step: int  # to train on
    model: PreTrainedModel  # the trained model; the sampler gets its weights before each step
    rows: Sequence[Row]  # the training rows; `rollout.dynamic_sampling` draws more of them
    prompts: Prompts
    objective: Objective
    sampler: Sampler  # with rollout.ahead a DistributedSampler
    teacher_sampler: Sampler | None  # samples from the teacher, for rollout.source: teacher
    reward_function: RewardFunction | None  # None: rollouts are not graded
    note: Callable[[str], None]  # shows a line in the terminal; called once
    processes: Processes  # sample together; the first one grades and draws
    progress: Callable[[int, int], None] | None = None  # called with counts of sequences, tokens
    ahead: RolloutsAhead | None = None  # the next step's rollouts, with rollout.ahead

    def __post_init__(self):
        self.sampling, source = Sampling.of(self.section), self.section.source
        skips = self.prompts.section.too_long == "skip"
        longest = window(self.model.config)
        self.teacher_contexts = TeacherContexts(self.prompts, longest, skips, self.note)
        self.samples = self.objective.samples_rollouts and source != "reference"
        drawn_by = self.teacher_sampler if source == "teacher" else self.sampler
        self.how = {"source": source, **described(drawn_by, self.sampling)}

    def __call__(
        self, rows: Sequence[Row], step: int = 0, following: Sequence[Row] = ()
    ) -> CollectedRollouts:
        """Make the problems of a step from these rows.

        step: the number of completed steps. following: the next step's rows, to sample ahead.
        """
        sync: dict[str, float] = {}
        ready = self._ready(step)
        if self.samples:
            with phase("rollout"):
                self.sampler.sync_weights(self.model)
            sync = getattr(self.sampler, "sync", {})
        more = self.section.dynamic_sampling
        if not more:
            self._begin(following)
        sampled = chosen = self._sample(rows, step, ready)
        if more:  # first sample what this step still needs
            sampled, chosen = self._sample_more(sampled, step)
            self._begin(following)
        measures = outcome_measures(sampled)
        if self.section.ahead:
            by = [rollout.weights_of for problem in sampled for rollout in problem.rollouts]
            measures["rollout_age"] = step - sum(by) / len(by)
        chosen, measured = self.teacher_contexts(chosen)
        return CollectedRollouts(sampled, chosen, sync | measures | measured)

    def go_on(self, read: Callable[[int, int, int], RolloutsAhead | None]) -> RolloutsAhead | None:
        """Restore the next step's rollouts from a checkpoint. `read` is called with the number of
        rollouts, their most tokens, and the model's vocabulary size."""
        if self.section.ahead:
            count = self.problems_per_step * self.section.group_size
            tokens = self.model.config.get_text_config().vocab_size
            self.ahead = read(count, self.section.max_new_tokens, tokens)
        return self.ahead

    def end(self) -> None:
        """Cancel sampling ahead."""
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.cancel()

    def _ready(self, step: int) -> list[Rollout] | None:
        """The step's rollouts if they were sampled ahead, with the weights of the step before."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            with phase("rollout"), suppress(ServerRestartedError):
                rollouts = ahead.result()
                if self.progress:
                    self.progress(len(rollouts), sum(len(rollout.ids) for rollout in rollouts))
                return [replace(rollout, weights_of=step - 1) for rollout in rollouts]
        if self.section.ahead and step:
            self.note(f"Step {step + 1}: its rollouts were lost, and are sampled by newer weights")
        return None

    def _begin(self, following: Sequence[Row]) -> None:
        """Start to sample the next step's rollouts."""
        if following:
            assert isinstance(self.sampler, DistributedSampler)
            contexts = self.prompts.contexts(following)
            self.ahead = self.sampler.begin(self._prefixes(contexts), self.sampling)

    def _prefixes(self, contexts: Sequence[Context], role: str = "student") -> list[list[int]]:
        return [each.of(role) for each in contexts for _ in range(self.section.group_size)]

    def _sample_more(
        self, sampled: list[Problem], step: int
    ) -> tuple[list[Problem], list[Problem]]:
        """Replace problems whose rewards are all equal by newly drawn ones.

        Returns all that were sampled, and those with differing rewards (or all, if there are none).
        """
        chosen = [problem for problem in sampled if informative(problem)]
        for _ in range(self.section.dynamic_sampling):
            missing = self.problems_per_step - len(chosen)
            if missing <= 0:
                break
            draw = partial(torch.randint, len(self.rows), (missing,))
            rows = [self.rows[i] for i in self.processes.once(draw).tolist()]
            more = self._sample(rows, step)
            sampled = sampled + more
            chosen += [problem for problem in more if informative(problem)]
        return sampled, chosen or sampled

    def _sample(
        self, rows: Sequence[Row], step: int, ready: list[Rollout] | None = None
    ) -> list[Problem]:
        """The rows' problems with graded rollouts: those in `ready`, or newly sampled ones."""
        contexts = self.prompts.contexts(rows)
        copies = self.section.group_size if self.objective.samples_rollouts else 0
        rollouts: list[Rollout] = []
        if ready is not None:
            rollouts = ready
        elif self.samples and self.section.source == "teacher":
            with phase("rollout"):
                prefixes = self._prefixes(contexts, self.objective.teacher_role)
                rollouts = self.teacher_sampler.sample(prefixes, self.sampling, self.progress)
        elif self.samples:
            with phase("rollout"):
                prefixes = self._prefixes(contexts)
                rollouts = self.sampler.sample(prefixes, self.sampling, self.progress)
            rollouts = [replace(rollout, weights_of=step) for rollout in rollouts]
        elif copies:
            copies = 1  # all copies of a reference are equal
            rollouts = [Rollout(self.prompts.target(row), True) for row in rows]
        problems = [
            Problem(row, context, rollouts[i * copies : (i + 1) * copies])
            for i, (row, context) in enumerate(zip(rows, contexts, strict=True))
        ]
        with phase("grading"):
            return self.processes.once(
                lambda: graded(problems, self.reward_function, self.prompts.unsolved)
            )


def rows_of_step(rows: Sequence[Row], step: int, section: TrainSection) -> list[Row]:
    """The rows of the step after `step` steps. Each epoch goes through all rows in a new order."""
    size = section.problems_per_step
    epoch, place = divmod(step, len(rows) // size)
    generator = torch.Generator().manual_seed(section.seed + epoch)
    order = torch.randperm(len(rows), generator=generator).tolist()
    return [rows[i] for i in order[place * size : (place + 1) * size]]

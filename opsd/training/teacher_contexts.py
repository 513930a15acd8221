"""Grades rollouts, measures the grades, and makes teacher contexts from rollouts.

Problems come here with their rollouts: `graded` grades them, and lets them vote where a row has no
solution; `TeacherContexts` fills in a teacher's template that contains rollouts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from opsd.common.errors import UserError
from opsd.common.templates import over_rollouts
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.grading.majority import WHY
from opsd.grading.rewards import RewardFunction
from opsd.objectives import Problem
from opsd.objectives.grpo import alike


def graded(
    problems: Sequence[Problem],
    reward_function: RewardFunction | None,
    unsolved: Callable[[Row], bool] = lambda row: False,
) -> list[Problem]:
    """The problems with an outcome for each rollout, and with the majority's answer where their
    row is unsolved; unchanged without a reward function, or where the run made the row."""
    if reward_function is None:
        return list(problems)
    problems = [
        replace(p, majority=reward_function.majority(p.rollouts, p.row)) if unsolved(p.row) else p
        for p in problems
    ]
    asked = [(rollout, p.row) for p in problems if not p.row.held for rollout in p.rollouts]
    if reward_function.verifier is None or not asked:
        return problems
    outcomes = iter(reward_function(*map(list, zip(*asked, strict=True))))
    return [
        replace(p, outcomes=None if p.row.held else [next(outcomes) for _ in p.rollouts])
        for p in problems
    ]


def informative(problem: Problem) -> bool:
    """Whether the problem's rewards differ. If not, all its advantages are 0."""
    return not alike([outcome.reward for outcome in problem.outcomes])


def outcome_measures(problems: Sequence[Problem]) -> dict[str, float]:
    """Compute the log's measures of graded rollouts.

    `pass_at_k`: the share of problems with at least one correct rollout, k = group_size.
    """
    problems = [problem for problem in problems if problem.outcomes is not None]
    if not problems:
        return {}
    outcomes = [outcome for p in problems for outcome in p.outcomes]
    return {
        "reward": sum(outcome.reward for outcome in outcomes) / len(outcomes),
        "correct_fraction": sum(outcome.correct for outcome in outcomes) / len(outcomes),
        "pass_at_k": sum(any(o.correct for o in p.outcomes) for p in problems) / len(problems),
        "format_fraction": sum(outcome.formatted for outcome in outcomes) / len(outcomes),
    }


def vote_measures(problems: Sequence[Problem]) -> dict[str, float]:
    """Measures of problems whose rollouts voted: the share with a majority, the reasons of the
    others, and the mean share of the most frequent answer; of majorities whose row has an answer,
    the share that is right."""
    votes = [problem.majority for problem in problems if problem.majority is not None]
    if not votes:
        return {}
    counts = {f"majority_{why}": sum(v.why == why for v in votes) / len(votes) for why in WHY}
    share = sum(vote.share for vote in votes) / len(votes)
    found = sum(bool(vote.answer) for vote in votes) / len(votes)
    known = [vote.correct for vote in votes if vote.correct is not None]
    right = {"majority_correct": sum(known) / len(known)} if known else {}
    return {"majority_fraction": found, **counts, "majority_share": share, **right}


@dataclass
class TeacherContexts:
    """Fills in a teacher's template that contains rollouts."""

    prompts: Prompts
    window: int | None  # the longest sequence that the models allow; None: no limit
    skip: bool  # skip rollouts that do not fit after the teacher's context; False: raise an error
    note: Callable[[str], None]  # shows a line in the terminal, for the first that is skipped
    noted: bool = False

    def __call__(self, problems: Sequence[Problem]) -> tuple[list[Problem], dict[str, float]]:
        """Add the teacher's context of each rollout; also returns measures for the log."""
        if not self.prompts.over_rollouts:
            return list(problems), {}
        too_long, filled_in = 0, []
        for problem in problems:
            teachers: dict[str, list] = {role: [] for role in self.prompts.over_rollouts}
            made: dict[str, list[int] | None] = {}  # of roles that see all rollouts alike
            for number, rollout in enumerate(problem.rollouts):
                for role, its in teachers.items():
                    if role not in made or over_rollouts(self.prompts.templates[role]):
                        made[role] = self._context(problem, number, role)
                    context = made[role]
                    length = 0 if context is None else len(context) + len(rollout.ids)
                    if self.window is not None and length > self.window:
                        self._too_long(problem, length, role)
                        too_long, context = too_long + 1, None
                    its.append(context)
            filled_in.append(replace(problem, teachers=teachers))
        contexts = [context for p in filled_in for its in p.teachers.values() for context in its]
        return filled_in, {
            "taught_fraction": sum(c is not None for c in contexts) / len(contexts),
            "too_long": too_long,
            **vote_measures(problems),
        }

    def _context(self, problem: Problem, number: int, role: str) -> list[int] | None:
        """A role's context for one rollout: of the row, or of it with its rollouts' majority."""
        row, vote = problem.row, problem.majority
        if vote is not None and vote.answer:
            row = self.prompts.solved(row, vote.answer)
        if self.prompts.holds(row, role):
            return problem.context.student
        if vote is not None and not vote.answer:
            return None
        outcomes = problem.outcomes or [None] * len(problem.rollouts)
        peers = [*outcomes[:number], *outcomes[number + 1 :]]
        return self.prompts.teacher_of(row, outcomes[number], peers, role)

    def _too_long(self, problem: Problem, length: int, role: str) -> None:
        what = (
            f"the teacher's context and a rollout of the problem {problem.row.problem[:60]!r} are "
            f"{length} tokens long, the model's window is {self.window}"
        )
        if not self.skip:
            raise UserError(
                f"{self.prompts.field(role)}: {what}; shorten the template or "
                "rollout.max_new_tokens, or leave such rollouts out with prompts.too_long: skip"
            )
        if not self.noted:
            self.note(f"Rollouts are left out, and counted as too_long: {what}")
            self.noted = True

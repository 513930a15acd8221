"""GRPO: a rollout's advantage is its reward against its group's mean.

A step makes one update from fresh rollouts, so the importance ratio is 1 and its clip never acts:
the gradient is -A_n ∇log p(y_n). The mean is over all the step's tokens (DAPO's form), and groups
whose rewards are all alike carry no signal and cost no forward pass.
"""

from collections.abc import Callable, Sequence

from opsd.config import LossSection
from opsd.hidden import Scored
from opsd.objectives.base import Problem, Sample
from opsd.objectives.likelihood import LikelihoodObjective
from opsd.rollout import Rollout

Reward = Callable[[Sequence[Rollout], Sequence[str]], Sequence[float]]
"""(rollouts, reference answers) → a reward each."""


class GRPO(LikelihoodObjective):
    """Policy gradient; the weight of a rollout's tokens is its advantage ÷ the step's tokens."""

    samples_rollouts = True

    def __init__(self, section: LossSection, reward: Reward):
        self.section, self.reward = section, reward

    def samples(self, problems: Sequence[Problem]) -> tuple[list[Sample], dict[str, float]]:
        """Every rollout of a group whose rewards differ."""
        rollouts = [rollout for p in problems for rollout in p.rollouts]
        answers = [p.row.answer for p in problems for _ in p.rollouts]
        rewards = list(self.reward(rollouts, answers))
        tokens = sum(len(rollout.ids) for rollout in rollouts)
        samples, used, position = [], 0, 0
        for p in problems:
            group = rewards[position : position + len(p.rollouts)]
            position += len(p.rollouts)
            advantages = group_advantages(group, self.section.scale_advantages)
            used += any(advantages)
            samples += [
                Sample(
                    (Scored(p.context.student, rollout.ids),), advantage / tokens, rollout.log_probs
                )
                for rollout, advantage in zip(p.rollouts, advantages, strict=True)
                if advantage
            ]
        mean = sum(rewards) / len(rewards)
        return samples, {"reward": mean, "informative_groups": used / len(problems)}


def group_advantages(rewards: Sequence[float], scale: bool) -> list[float]:
    """r - mean of one group's rewards, ÷ their standard deviation if `scale`; 0 if all alike."""
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    deviation = (sum(c * c for c in centred) / len(centred)) ** 0.5
    return [c / deviation for c in centred] if scale else centred

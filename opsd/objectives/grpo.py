"""GRPO: a rollout's advantage is its reward against its group's mean.

A step makes one update from fresh rollouts, so the importance ratio is 1 and its clip never acts:
the gradient is −A_n ∇log p(y_n). The mean is over all the step's tokens (DAPO's form), and groups
whose rewards are all alike carry no signal and cost no forward pass.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from opsd.config import LossSection
from opsd.objectives.base import Sample, Totals
from opsd.objectives.likelihood import weighted_likelihood


class GRPO:
    """Policy gradient; a sample's weight is its advantage ÷ the step's tokens."""

    def __init__(self, section: LossSection):
        self.section = section

    def loss(self, model: PreTrainedModel, samples: Sequence[Sample], totals: Totals) -> Tensor:
        """See `Objective.loss`."""
        return weighted_likelihood(model, samples, totals, self.section)


def group_advantages(rewards: Sequence[float], scale: bool) -> list[float]:
    """(r − mean) of one group's rewards, ÷ their standard deviation if `scale`; 0 if all alike."""
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    deviation = (sum(c * c for c in centred) / len(centred)) ** 0.5
    if deviation == 0:
        return [0.0] * len(rewards)
    return [c / deviation for c in centred] if scale else centred

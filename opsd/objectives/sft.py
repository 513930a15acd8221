"""SFT on solutions: the mean of −log p(y_n) over the tokens of the target text."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from opsd.config import LossSection
from opsd.objectives.base import Sample, Totals
from opsd.objectives.likelihood import weighted_likelihood


class SFT:
    """Cross-entropy; a sample's weight is 1 ÷ the step's tokens."""

    def __init__(self, section: LossSection):
        self.section = section

    def loss(self, model: PreTrainedModel, samples: Sequence[Sample], totals: Totals) -> Tensor:
        """See `Objective.loss`."""
        return weighted_likelihood(model, samples, totals, self.section)

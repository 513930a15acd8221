"""Who samples the rollouts: `generate` in sorted batches, or `continuous` batching."""

from opsd.rollout.base import Rollout, Sampler, Sampling
from opsd.rollout.continuous import ContinuousSampler
from opsd.rollout.generate import GenerateSampler

SAMPLERS = {"generate": GenerateSampler, "continuous": ContinuousSampler}

__all__ = ["SAMPLERS", "ContinuousSampler", "GenerateSampler", "Rollout", "Sampler", "Sampling"]

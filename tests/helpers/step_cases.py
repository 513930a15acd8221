"""Samples and a training step for the tests of packing."""

import torch

from helpers.prefix_models import ids, make
from opsd.config.loss import LossSection
from opsd.objectives import OPSD, Sample
from opsd.prefix.rollout_states import Scored
from opsd.training.step import OPSDStep


def make_samples():
    """Four problems' rollouts in both roles."""
    samples = []
    for number, lengths in enumerate(((5, 9), (3, 1, 7), (8,), (6, 6))):
        student, teacher = ids(7, 19, seed=number)
        for rollout in ids(*lengths, seed=10 + number):
            roles = tuple(Scored(c.tolist(), rollout.tolist()) for c in (student, teacher))
            samples.append(Sample(roles, 1 / 45))
    return samples


def make_step(share=True):
    model, teacher = make("Qwen3"), make("Qwen3")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.01 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    return OPSDStep(model, OPSD(LossSection(backend="torch"), teacher), share)

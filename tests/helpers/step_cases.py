"""Groups of samples and a training step for the tests of packing."""

import torch

from helpers.prefix_models import ids, make
from opsd.config.loss import LossSection
from opsd.objectives import OPSD, Sample, SampleGroup
from opsd.training.step import OPSDStep


def make_sample_groups():
    """Four problems' rollouts in both roles."""
    groups = []
    for number, lengths in enumerate(((5, 9), (3, 1, 7), (8,), (6, 6))):
        student, teacher = (context.tolist() for context in ids(7, 19, seed=number))
        samples = [Sample(r.tolist(), 1 / 45) for r in ids(*lengths, seed=10 + number)]
        groups.append(SampleGroup(student, samples, [teacher]))
    return groups


def make_step(share=True):
    model, teacher = make("Qwen3"), make("Qwen3")
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.01 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    return OPSDStep(model, OPSD(LossSection(backend="torch"), teacher), share)

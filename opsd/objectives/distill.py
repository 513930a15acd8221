"""On-policy distillation: a separate teacher scores the student's rollouts in the same context.

The divergence is OPSD's. The teacher has better weights, not a better prompt. (GKD, Agarwal et al.,
arXiv 2306.13649. With rollout.source: teacher or reference it is the off-policy baseline,
distillation on given text.)
"""

from opsd.objectives.opsd import OPSD


class Distill(OPSD):
    """OPSD's divergence to a teacher in the student's context."""

    teacher_role = "student"

"""Policy gradients, token by token.

The surrogate is PPO's (Schulman et al., arXiv 1707.06347): with r = p(y_n) / p_old(y_n) and an
advantage A_n that no gradient flows through,

    l_n = -min(r A, clip(r, 1 - ε_low, 1 + ε_high) A).

In a step's first update r = 1, so l_n = -A_n with the gradient -A_n ∇log p(y_n). ε_high above
ε_low is DAPO's clip-higher (arXiv 2503.14476).
"""

import torch
from torch import Tensor

from opsd.config.loss import LossSection


def surrogate(
    log_prob: Tensor, old: Tensor, advantage: Tensor, section: LossSection
) -> tuple[Tensor, Tensor]:
    """(l_n, whether the clip stops its gradient) for each token, [N] each."""
    high = section.epsilon if section.epsilon_high is None else section.epsilon_high
    ratio = (log_prob - old).exp()
    free = ratio * advantage
    bounded = ratio.clamp(1 - section.epsilon, 1 + high) * advantage
    return -torch.minimum(free, bounded), bounded.detach() < free.detach()


def k3(log_prob: Tensor, reference: Tensor) -> Tensor:
    """An unbiased estimate of KL(p ‖ reference) from tokens sampled from p, never negative: [N].

    exp(d) - d - 1 with d = log p_ref - log p (Schulman, "Approximating KL divergence", 2020).
    """
    difference = reference - log_prob
    return difference.exp() - difference - 1


def teacher_credit(
    advantage: Tensor, old: Tensor, teacher: Tensor, share: Tensor, clip: float
) -> Tensor:
    """RLSD (arXiv 2604.03128, eq. 13 to 15): the reward says in which direction a token is pushed,
    the teacher says how far.

    A_n = A ((1 - λ) + λ clip(w_n, 1 - ε_w, 1 + ε_w)),  w_n = (p_T(y_n) / p_S(y_n))^sign(A): [N],
    with λ = `share` [N]. The factor is positive: no token is pushed against its rollout's
    reward.
    """
    evidence = (advantage.sign() * (teacher - old)).exp()
    return advantage * (1 - share + share * evidence.clamp(1 - clip, 1 + clip))

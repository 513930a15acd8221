"""The methods in their dense form, with all logits in memory; autograd does the rest.

They follow the papers' formulas and use no code of `opsd`. Logits are [R, V] of one rollout, in the
student's and the teacher's context; `ids` [R] are its tokens. Each function returns the loss of
each token, [R]; `step` computes a step's loss from them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def divergence(
    student: Tensor, teacher: Tensor, kind: str, beta: float, clip: tuple[str, float] | None
) -> Tensor:
    """D(p_T ‖ p_S), with each entry or token bounded by `clip`."""
    s, t = student.softmax(-1), teacher.softmax(-1)
    m = beta * t + (1 - beta) * s
    entries = {
        "forward_kl": t * (t.log() - s.log()),
        "reverse_kl": s * (s.log() - t.log()),
        "jsd": beta * t * (t.log() - m.log()) + (1 - beta) * s * (s.log() - m.log()),
    }[kind]
    if clip is not None and clip[0] == "entry":
        entries = entries.clamp(max=clip[1])
    tokens = entries.sum(-1)
    if clip is not None and clip[0] == "token":
        tokens = tokens * (clip[1] / tokens.detach()).clamp(max=1)
    return tokens


def log_p(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1)[torch.arange(len(ids)), ids]


def policy_gradient(
    student: Tensor, ids: Tensor, advantage: Tensor, old: Tensor | None, low: float, high: float
) -> Tensor:
    """PPO's clipped surrogate; without `old` at the old policy itself."""
    now = log_p(student, ids)
    ratio = (now - (now.detach() if old is None else old)).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def sampled_token(student: Tensor, teacher: Tensor, ids: Tensor, old=None, **clip) -> Tensor:
    """OPSD's advantage: log p_T(y) - log p_S(y), with p_S from when y was sampled."""
    before = log_p(student, ids).detach() if old is None else old
    advantage = (log_p(teacher, ids) - before).detach()
    return policy_gradient(student, ids, advantage, old, **clip)


def credited(student: Tensor, teacher: Tensor, ids: Tensor, advantage: float, share, bound):
    """RLSD: the evidence ratio to the power of the advantage's sign, clipped."""
    ratio = (log_p(teacher, ids) - log_p(student, ids)).detach().exp()
    weight = (ratio if advantage > 0 else 1 / ratio).clamp(1 - bound, 1 + bound)
    return advantage * (1 - share + share * weight)


def kl_to_reference(student: Tensor, reference: Tensor, ids: Tensor) -> Tensor:
    """Schulman's k3."""
    ratio = (log_p(reference, ids) - log_p(student, ids)).exp()
    return ratio - 1 - ratio.log()


def step(losses: Sequence[Tensor], weights: Sequence[Tensor], aggregation: str, longest: int):
    """The step's loss from the tokens' losses and weights, one tensor for each rollout."""
    sums = [(loss * weight).sum() for loss, weight in zip(losses, weights, strict=True)]
    if aggregation == "token":
        return sum(sums) / sum(weight.sum() for weight in weights)
    if aggregation == "rollout":
        return sum(s / w.sum() for s, w in zip(sums, weights, strict=True)) / len(sums)
    return sum(sums) / (len(sums) * longest)

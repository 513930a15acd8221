"""The dense reference: the formulas written literally, with all logits in memory, in the dtype of
the inputs. Autograd does the rest.

The fused functions are tested against it in fp64, and gradcheck checks it. The documented gradient
treats the token clip's factor as a constant, so it is detached here too.
"""

import torch
from torch import Tensor

from opsd_kernels.divergence import Clip, Divergence, LogitTransform

FORWARD_KL, IDENTITY = Divergence(), LogitTransform()


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform
) -> Tensor:
    """[N, D], [V, D] -> [N, V]."""
    z = hidden @ weight.T
    return transformed(z if bias is None else z + bias, transform)


def transformed(z: Tensor, transform: LogitTransform) -> Tensor:
    """Transform a head's product to the logit."""
    z = z * transform.scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    return z / transform.temperature


def _product(p: Tensor, log_ratio: Tensor) -> Tensor:
    """p * log_ratio with 0 * anything = 0, in value and gradient: a padded entry has probability
    0.
    """
    return torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, log_ratio))


def entropy(log_p: Tensor) -> Tensor:
    """[N, V] log-probabilities -> [N], nats."""
    return -_product(log_p.exp(), log_p).sum(-1)


def entries(log_s: Tensor, log_t: Tensor, divergence: Divergence) -> Tensor:
    """The terms l_nv whose sum over v is the divergence of token n: [N, V]."""
    s, t = log_s.exp(), log_t.exp()
    if divergence.name == "forward_kl":
        return _product(t, log_t - log_s)
    if divergence.name == "reverse_kl":
        return _product(s, log_s - log_t)
    b = divergence.beta
    m = b * t + (1 - b) * s
    log_m = torch.where(m == 0, 0.0, torch.where(m == 0, 1.0, m).log())
    return b * _product(t, log_t - log_m) + (1 - b) * _product(s, log_s - log_m)


def token_divergence(
    student: Tensor, teacher: Tensor, divergence: Divergence, clip: Clip | None = None
) -> tuple[Tensor, Tensor]:
    """Logits [N, V] of both roles -> (clipped, unclipped) divergence of each token, [N] each."""
    terms = entries(student.log_softmax(-1), teacher.log_softmax(-1), divergence)
    unclipped = terms.sum(-1)
    if clip is None:
        return unclipped, unclipped
    if clip.kind == "token":
        factor = torch.where(unclipped > clip.threshold, clip.threshold / unclipped, 1.0)
        return unclipped * factor.detach(), unclipped
    return terms.clamp(max=clip.threshold).sum(-1), unclipped


def linear_divergence(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    weight: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    divergence: Divergence = FORWARD_KL,
    transform: LogitTransform = IDENTITY,
    token_weight: Tensor | None = None,
    clip: Clip | None = None,
    reduction: str = "mean",
    teacher_transform: LogitTransform | None = None,
) -> Tensor:
    """The loss of `opsd_kernels.linear_divergence`, computed densely; hidden [N, D], weight [V,
    D].
    """
    student = logits(student_hidden, weight, bias, transform)
    with torch.no_grad():
        teacher = logits(
            teacher_hidden,
            weight if teacher_weight is None else teacher_weight,
            bias if teacher_weight is None and teacher_bias is None else teacher_bias,
            transform if teacher_transform is None else teacher_transform,
        )
    if token_weight is None:
        token_weight = student.new_ones(student.shape[0])
    keep = token_weight != 0
    clipped, _ = token_divergence(student[keep], teacher[keep], divergence, clip)
    weighted = torch.zeros_like(token_weight).masked_scatter(keep, token_weight[keep] * clipped)
    if reduction == "none":
        return weighted
    total = token_weight.sum() if reduction == "mean" else 1.0
    return weighted.sum() / total if reduction == "sum" or total != 0 else weighted.sum() * 0.0


def linear_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
) -> tuple[Tensor, Tensor]:
    """(log-probability of each target, entropy), [N] each."""
    log_p = logits(hidden, weight, bias, transform).log_softmax(-1)
    return log_p.gather(-1, targets[:, None]).squeeze(-1), entropy(log_p)

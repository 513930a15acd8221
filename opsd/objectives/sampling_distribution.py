"""Log-probabilities under the distribution that rollouts are drawn from.

A policy gradient is that of the policy that sampled: softmax(z / τ), and with top-k or top-p the
same over the tokens that these leave, renormalised. At temperature τ alone the fused kernel serves.
Which tokens top-k and top-p leave is known from a whole row of logits only, so that these take
blocks of rows, whose logits backward computes again.

Legend: N tokens, V vocabulary, D hidden width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opsd.rollout.base import Sampling
from opsd.rollout.logits_sampling import warpers
from opsd_kernels import linear_log_prob

DEFAULT_BUDGET = 1 << 28
COPIES = 6
"""fp32 tensors of a block's logits that forward and backward hold at once."""


class SampledLogProb(NamedTuple):
    """Of each token [N], fp32: log q(y), and the entropy of q (detached)."""

    log_prob: Tensor
    entropy: Tensor


def sampled_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sampling: Sampling | None,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> SampledLogProb:
    """log q of the tokens `targets` [N], of the states [N, D] that predict them.

    q is what `sampling` draws from: temperature, then top-k, then top-p, renormalised. A target
    that these leave out, as after an update of the weights, counts as one that they leave.

    Args:
        sampling: None: the model's own distribution.
        weight, bias: the head's, [V, D] and [V].
        memory_budget: bytes of logits; None: the kernel's own choice.
    """
    greedy = sampling is None or sampling.temperature == 0  # the model's own distribution
    temperature = 1.0 if greedy else sampling.temperature
    if greedy or (sampling.top_p == 1 and sampling.top_k == 0):
        found = linear_log_prob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            memory_budget=memory_budget,
            backend=backend,
        )
        return SampledLogProb(found.log_prob, found.entropy)

    def block(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = hidden.float() @ weight.float().T
        if bias is not None:
            logits = logits + bias.float()
        logits = logits * logit_scale
        if logit_softcap:
            logits = logit_softcap * torch.tanh(logits / logit_softcap)
        left = warpers(sampling)(targets[:, None], logits.detach()).isfinite()
        left = left.scatter(1, targets[:, None], True)
        log_q = (logits / temperature).masked_fill(~left, -torch.inf).log_softmax(-1)
        drawn = log_q.detach()
        entropy = -(drawn.exp() * drawn.masked_fill(~left, 0.0)).sum(-1)
        return log_q.gather(1, targets[:, None])[:, 0], entropy

    rows = max(1, (memory_budget or DEFAULT_BUDGET) // (4 * COPIES * len(weight)))
    pieces = [
        checkpoint(block, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    if not pieces:
        return SampledLogProb(hidden.sum(-1).float(), hidden.new_zeros(0, dtype=torch.float32))
    return SampledLogProb(*map(torch.cat, zip(*pieces, strict=True)))

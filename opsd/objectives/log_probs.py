"""Log-probabilities of rollouts' tokens, under the distribution from which they are sampled.

A policy gradient is for the policy that sampled: softmax(z / τ) and, with top-k or top-p, the same
over the tokens that remain, renormalised. With only a temperature τ the fused kernel computes it.
Which tokens top-k and top-p keep is known only from a whole row of logits: this is computed in
blocks of rows, whose logits backward computes again.

Legend: N tokens, V vocabulary, D hidden width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.config.loss import LossSection
from opsd.models.dropout import switch_off_dropout
from opsd.models.head import as_operands, head, head_arguments, logits_of, mixed
from opsd.objectives.groups import MicroBatch, SampleGroup, as_student
from opsd.prefix import rollout_hidden_states
from opsd.rollout import Sampling
from opsd.rollout.logits_sampling import warpers
from opsd_kernels import linear_log_prob

DEFAULT_BUDGET = 1 << 28
COPIES = 6
"""The number of fp32 tensors of a block's logits that forward and backward hold at once."""


class SampledLogProb(NamedTuple):
    """log q(y) of each token, and the entropy of q (detached): [N] each, fp32."""

    log_prob: Tensor
    entropy: Tensor


def sampled_log_prob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    sampling: Sampling | None,
    *,
    bias: Tensor | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    **how_logits_are_made: Any,
) -> SampledLogProb:
    """log q of the tokens `targets` [N], from the states [N, D] that predict them.

    q is the distribution of `sampling`: temperature, then top-k, then top-p, renormalised. A target
    that these remove, as after an update of the weights, counts as one that they keep.

    Args:
        sampling: None: the model's own distribution.
        weight, bias: the head's, [V, D] and [V].
        memory_budget: bytes of logits; None: the kernel's own choice.
        how_logits_are_made: see `head_arguments`.
    """
    temperature = whole_temperature(sampling)
    if temperature is not None:
        found = linear_log_prob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            memory_budget=memory_budget,
            backend=backend,
            **how_logits_are_made,
        )
        return SampledLogProb(found.log_prob, found.entropy)

    def block(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(hidden, weight, bias, **how_logits_are_made)
        left = warpers(sampling)(cast(Any, targets[:, None]), logits.detach()).isfinite()
        left = left.scatter(1, targets[:, None], True)
        log_q = (logits / sampling.temperature).masked_fill(~left, -torch.inf).log_softmax(-1)
        drawn = log_q.detach()
        entropy = -(drawn.exp() * drawn.masked_fill(~left, 0.0)).sum(-1)
        return log_q.gather(1, targets[:, None])[:, 0], entropy

    rows = max(1, (memory_budget or DEFAULT_BUDGET) // (4 * COPIES * len(weight)))
    pieces = [
        checkpoint(block, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    return SampledLogProb(*map(torch.cat, zip(*pieces, strict=True)))


def whole_temperature(sampling: Sampling | None) -> float | None:
    """The temperature of the sampling distribution; None if top-k or top-p remove tokens."""
    if sampling is None or sampling.temperature == 0:  # the model's own distribution
        return 1.0
    return sampling.temperature if sampling.top_p == 1 and sampling.top_k == 0 else None


def token_log_prob(
    model: PreTrainedModel,
    hidden: Tensor,
    batch: MicroBatch,
    section: LossSection,
    sampling: Sampling | None = None,
    scored_by: tuple[Tensor, Tensor | None] | None = None,
    rows: Tensor | slice = slice(None),
) -> SampledLogProb:
    """log p and entropy of each rollout token [Σ R], from the states [Σ R, D] that predict them.

    sampling: p is the distribution of this sampling; None: the model's own, at temperature 1.
    scored_by: the head's weight and bias; None: the model's.
    rows: which of the tokens.
    """
    weight, bias = scored_by or head(model)
    hidden, weight, bias = as_operands((hidden[rows], weight, bias))
    options: dict[str, Any] = {"memory_budget": section.memory_budget, "backend": section.backend}
    options |= head_arguments(model)
    with phase("loss"):
        targets = batch.targets()[rows]
        return sampled_log_prob(hidden, weight, targets, sampling, bias=bias, **options)


@torch.no_grad()
def rollout_log_prob(
    model: PreTrainedModel,
    groups: Sequence[SampleGroup],
    section: LossSection,
    share: bool,
    sampling: Sampling | None = None,
    vocabulary: int | None = None,
) -> Tensor:
    """log p of each rollout token [Σ R] by `model`, in the student's contexts, without dropout."""
    switch_off_dropout(model)
    batch = MicroBatch(groups, model.device, share)
    with phase("teacher"):
        hidden = rollout_hidden_states(model, as_student(groups), share)
    own = None if vocabulary is None else mixed([model], [hidden], [1.0], vocabulary)[1:]
    return token_log_prob(model, hidden, batch, section, sampling, own).log_prob

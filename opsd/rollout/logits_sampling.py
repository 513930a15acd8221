"""Samples a token from logits."""

import torch
from torch import LongTensor, Tensor
from torch.nn.functional import pad
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from opsd.rollout.base import Sampling

BLOCK = 256  # entries of the vocabulary whose probabilities are summed in fp32
BELOW_ONE = 1 - 2**-40


def warpers(sampling: Sampling) -> LogitsProcessorList:
    """transformers' warpers: temperature, top-k, top-p, in this order. -inf: never sampled."""
    found = LogitsProcessorList()
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    return found


class Draw(LogitsProcessor):
    """Samples a token for each row, and makes it the only one that greedy `generate` can choose.

    It uses the inverse of the cumulative distribution, and one random number a row. `generate`'s
    torch.multinomial needs one for each entry of the vocabulary, which on a CPU takes as long as
    the model: 56 ms, against 1.2 ms here, for 32 rows of 49 152.
    """

    def __init__(self, sampling: Sampling):
        self.warpers = warpers(sampling)

    def __call__(self, input_ids: LongTensor, scores: Tensor) -> Tensor:
        """scores [B, V] → the same shape, 0 at the sampled tokens and -inf elsewhere."""
        probability = self.warpers(input_ids, scores).softmax(-1)
        size = scores.shape[-1]
        blocks = pad(probability, (0, -size % BLOCK)).unflatten(-1, (-1, BLOCK))
        number = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device)
        block, number = _entry_at(number, blocks.sum(-1))
        chosen = blocks.take_along_dim(block[..., None], 1)[:, 0]
        token = block * BLOCK + _entry_at(number, chosen)[0]
        token.clamp_(max=size - 1)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)


def _entry_at(number: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of weights [B, n] ≥ 0, the entry at these shares [B, 1] of their sum, summed in fp64; and the
    shares of that entry's own weight. Both are below 1. It is never an entry of weight 0."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    number = number * cumulative[:, -1:]
    entry = torch.searchsorted(cumulative, number, right=True)
    entry.clamp_(max=weights.shape[-1] - 1)
    beyond = (cumulative.gather(-1, entry) - number) / weights.gather(-1, entry)
    return entry, (1 - beyond).clamp_(0, BELOW_ONE)

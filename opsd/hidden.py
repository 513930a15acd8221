"""The hidden states that predict a rollout's tokens, for a batch of contexts and rollouts.

Legend: B sequences, L padded length, P context length, R rollout length, D hidden width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Scored:
    """A rollout in one role: the context it continues, and its own tokens."""

    context: Sequence[int]
    rollout: Sequence[int]

    def __len__(self) -> int:
        return len(self.context) + len(self.rollout)


def rollout_hidden_states(model: PreTrainedModel, sequences: Sequence[Scored]) -> Tensor:
    """The last hidden states, after the final norm, that predict each rollout token: [Σ R, D].

    Padding stands at the right end, where a causal model cannot see it: no mask, and the fast
    causal attention. The state at position P - 1 predicts the first rollout token. The last
    rollout token is a target only and is not run through the model.
    """
    width = max(map(len, sequences)) - 1
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    rows, columns = [], []
    for row, sequence in enumerate(sequences):
        tokens = [*sequence.context, *sequence.rollout][:-1]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        rows += [row] * len(sequence.rollout)
        columns += range(len(sequence.context) - 1, len(tokens))
    decoder = model.get_decoder()
    hidden = decoder(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    return hidden[torch.tensor(rows), torch.tensor(columns)]


Item = TypeVar("Item")


def micro_batches(
    items: Sequence[Item], longest: Callable[[Item], int], max_tokens: int
) -> list[list[Item]]:
    """Group items so that no padded batch exceeds `max_tokens`; like lengths together.

    `longest(item)` is the item's length in its longest role. A single item longer than
    `max_tokens` gets a batch of its own.
    """
    batches: list[list[Item]] = []
    for item in sorted(items, key=longest):
        if batches and longest(item) * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches

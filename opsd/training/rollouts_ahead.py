"""Saves rollouts that were sampled a step ahead (`rollout.ahead`) in a checkpoint.

Sampling them again on resume is not possible: the weights that sampled them are gone, and an engine
that batches samples others from the same seeds. A resumed run would train on other rollouts than
one that was not stopped. If it dropped those still being sampled, it would train on shorter ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from opsd.rollout import Rollout

FILE = "rollouts_ahead.pt"
NO_SEED = -1

DTYPES = {
    "ids": torch.int32,  # [Σ R]
    "log_probs": torch.float64,  # [Σ R]
    "lengths": torch.int64,  # [rollouts], like the next two
    "finished": torch.bool,
    "seeds": torch.int64,
}


def as_tensors(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """The rollouts as the tensors in `FILE`."""
    values = {
        "ids": [token for rollout in rollouts for token in rollout.ids],
        "log_probs": [value for rollout in rollouts for value in rollout.sampling_log_probs or []],
        "lengths": [len(rollout.ids) for rollout in rollouts],
        "finished": [rollout.finished for rollout in rollouts],
        "seeds": [NO_SEED if r.seed is None else r.seed for r in rollouts],
    }
    return {name: torch.tensor(values[name], dtype=dtype) for name, dtype in DTYPES.items()}


def of_tensors(found: Any, count: int, longest: int, vocabulary: int) -> list[Rollout]:
    """The rollouts that `as_tensors` was given. Raises ValueError unless there are `count` of them,
    of at most `longest` tokens, with ids below `vocabulary`."""
    if not isinstance(found, dict) or any(
        not isinstance(t := found.get(name), Tensor) or t.dtype != dtype or t.dim() != 1
        for name, dtype in DTYPES.items()
    ):
        raise ValueError(f"{FILE} holds no rollouts")
    ids, log_probs, lengths, finished, seeds = (found[name] for name in DTYPES)
    if not len(lengths) == len(finished) == len(seeds) == count:
        raise ValueError(f"{FILE} holds {len(lengths)} rollouts, and the step has {count}")
    if not (lengths.min() >= 1 and lengths.max() <= longest):
        raise ValueError(f"{FILE} holds rollouts that are not of 1 to {longest} tokens")
    if not len(ids) == len(log_probs) == lengths.sum():
        raise ValueError(f"{FILE} lacks tokens, or log-probabilities")
    if not (ids.min() >= 0 and ids.max() < vocabulary):
        raise ValueError(f"{FILE} holds tokens that the model does not have")
    if not (log_probs.isfinite().all() and log_probs.max() <= 0):
        raise ValueError(f"{FILE} holds log-probabilities that are not finite, or above 0")
    sizes = lengths.tolist()
    return [
        Rollout(own.tolist(), done, by_engine.tolist(), None if seed == NO_SEED else seed)
        for own, done, by_engine, seed in zip(
            ids.split(sizes), finished.tolist(), log_probs.split(sizes), seeds.tolist(), strict=True
        )
    ]

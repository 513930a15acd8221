"""The interface of all samplers: their arguments and results."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.config.sections import RolloutSection
from opsd.models.copies import update_copy

Contexts = Sequence[Sequence[int]]
Progress = Callable[[int, int], None]
"""Called with new counts of sequences and tokens."""

NEUTRAL = {"min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
NEUTRAL["repetition_penalty"] = 1.0
"""Sent to servers with `Sampling`, or the model's generation_config.json would decide these."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. `temperature` 0 is greedy; `top_p` 1 and `top_k` 0 are off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 64

    @classmethod
    def of(cls, section: RolloutSection) -> "Sampling":
        """The config's settings for rollouts."""
        return cls(**{field.name: getattr(section, field.name) for field in fields(cls)})

    @property
    def draws_from_the_model(self) -> bool:
        """Whether tokens come from the model's own distribution, or are its likeliest."""
        return self.temperature == 0 or (
            self.temperature == 1 and self.top_p == 1 and self.top_k == 0
        )


@dataclass(frozen=True)
class Rollout:
    """What the model wrote after a context: token ids, with the stop token if there was one."""

    ids: list[int]
    finished: bool  # False: cut at max_new_tokens
    # The engine's log p of each token, at temperature 1, before top-p and top-k. None if the
    # student's own module sampled.
    sampling_log_probs: list[float] | None = None
    seed: int | None = None  # this rollout's own, if the engine takes one for each
    weights_of: int | None = None  # the step after which these weights sampled; 0: the start


class Sampler(Protocol):
    """Samples one rollout for each context, in the contexts' order."""

    engine: str  # its name in rollout.engine

    def sync_weights(self, model: PreTrainedModel) -> None:
        """Sample with the current weights of `model`, the trained model, from now on."""
        ...

    def sample(
        self, contexts: Contexts, sampling: Sampling, progress: Progress | None = None
    ) -> list[Rollout]:
        """One rollout for each context. `progress(sequences, tokens)` is called with new counts."""
        ...


class OwnSampler:
    """A sampler with a model of this process, which stops at the tokens `stops`."""

    def __init__(self, model: PreTrainedModel, stops: frozenset[int]):
        self.model, self.stops = model, stops

    def sync_weights(self, model: PreTrainedModel) -> None:
        """See `Sampler.sync_weights`; does nothing if it samples from `model` itself."""
        if self.model is not model:
            update_copy(self.model, model)


def described(sampler: Sampler, sampling: Sampling) -> dict[str, Any]:
    """Describe the sampling for the log: the engine, a server's release, the settings."""
    software = getattr(sampler, "software", None)
    named = {"engine": sampler.engine} | ({"software": software} if software else {})
    return named | asdict(sampling)


def draw_seeds(sampling: Sampling, count: int) -> list[int | None]:
    """A seed for each rollout, from torch's generator; None for greedy ones, which need none."""
    if sampling.temperature == 0:
        return [None] * count
    return torch.randint(2**31, (count,)).tolist()


def cut(ids: Sequence[int], stops: frozenset[int]) -> Rollout:
    """The rollout up to and with its first stop token."""
    for position, token in enumerate(ids):
        if token in stops:
            return Rollout(list(ids[: position + 1]), True)
    return Rollout(list(ids), False)


def decode(tokenizer: PreTrainedTokenizerBase, rollouts: Sequence[Rollout]) -> list[str]:
    """The rollouts' texts, for graders and readers; they are never tokenised again."""
    return tokenizer.batch_decode([rollout.ids for rollout in rollouts], skip_special_tokens=True)

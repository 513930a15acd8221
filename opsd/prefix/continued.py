"""Prefixes shared by what they leave behind: keys, values and states of recurrent layers.

Where no gradient is wanted, as in the teacher's pass, a prefix runs once, in chunks, and its cache
is copied for each of its rollouts, which continue it side by side. This is for models that cannot
run packed streams, such as those with linear attention or state-space layers: any model with a
cache that several tokens at once can continue. Some models' layers read their state for single
tokens only; whether one's do is seen by trying it.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd.common.errors import in_short
from opsd.models.head import decoder_of
from opsd.prefix.layout import CheckedGroup

STATES = ("past_key_values", "cache", "cache_params", "state")
"""What transformers' decoders call what a sequence leaves; they take and return it by one name."""

CHUNK = 4096
"""Tokens of a prefix that run at once, so that its length costs no memory but its cache's."""

ROUNDING, HALF = 5e-6, 0.05
"""How far rounding moves a state, relative to the largest, in fp32 and in 16 bits. A state that a
layer does not read moves others by 1e-5 and more, even with random weights."""


class Continuation:
    """A prefix that has run: the state [D] that predicts the first token, and what it left."""

    def __init__(self, model: PreTrainedModel, prefix: Tensor):
        self.decoder, self.cache = decoder_of(model), None
        with _as_sampling(self.decoder):
            for chunk in prefix.to(model.device).split(CHUNK):
                states, self.cache = _run(self.decoder, chunk[None], self.cache)
        self.last = states[0, -1]

    def states(self, rollouts: Sequence[Tensor]) -> list[Tensor]:
        """The states [R, D] that predict each rollout's tokens."""
        longest = max(map(len, rollouts)) - 1
        if not longest:
            return [self.last[None]] * len(rollouts)
        # Padding stands at the right end, where neither attention nor a state has seen it yet.
        ids = nn.utils.rnn.pad_sequence([r[:-1] for r in rollouts], batch_first=True)
        copies = _copies(self.cache, len(rollouts), self.last.device)
        with _as_sampling(self.decoder):
            states, _ = _run(self.decoder, ids.to(self.last.device), copies)
        rows = zip(states, rollouts, strict=True)
        return [torch.cat([self.last[None], row[: len(ids) - 1]]) for row, ids in rows]


@torch.no_grad()
def continued_hidden_states(
    model: PreTrainedModel, groups: Sequence[CheckedGroup], prefixes: Sequence[Continuation | None]
) -> Tensor:
    """The states that predict the rollouts' tokens [Σ R, D], each prefix run once.

    prefixes: those that have run.
    """
    found: list[Tensor] = []
    for (prefix, rollouts), ran in zip(groups, prefixes, strict=True):
        found += (ran or Continuation(model, prefix)).states(rollouts)
    return torch.cat(found)


def uncontinuable(model: PreTrainedModel) -> str | None:
    """Why rollouts cannot continue the cache of a prefix; None where they can."""
    decoder = decoder_of(model)
    if decoder not in _known:
        try:
            # Autocast would keep the weights that it casts here, without a graph.
            with torch.autocast(model.device.type, enabled=False):
                _known[decoder] = _obstacle(model)
        except Exception as error:  # of the model's own code
            _known[decoder] = f"{type(decoder).__name__} cannot continue it ({in_short(error)})"
    return _known[decoder]


_known: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


@torch.no_grad()
def _obstacle(model: PreTrainedModel) -> str | None:
    """Tries two rollouts: their states against those of whole sequences, and how far they are from
    those without the prefix."""
    decoder = decoder_of(model)
    name = type(decoder).__name__
    if _states_argument(decoder) is None:
        return f"{name} takes no cache"
    if any(getattr(module, "indexer", None) is not None for module in decoder.modules()):
        return f"{name} chooses keys by their scores, and rounding changes which"
    ids = torch.arange(3, 24) % len(model.get_input_embeddings().weight)
    prefix, rollouts = ids[:9], ids[9:].view(2, 6)
    ran = Continuation(model, prefix)
    _, again = ran.states(rollouts), ran.states(rollouts)  # the first must leave the cache alone
    found = torch.stack(again).float()
    with _as_sampling(decoder):
        whole = torch.cat([prefix.expand(2, -1), rollouts[:, :-1]], 1).to(model.device)
        wanted = decoder(input_ids=whole, use_cache=False).last_hidden_state[:, 8:].float()
        bare = decoder(input_ids=whole[:, 9:], use_cache=False).last_hidden_state.float()
    error = (found - wanted).abs().max()
    told = (bare - wanted[:, 1:]).abs().max()  # what the prefix tells them
    tolerance = ROUNDING if model.dtype in (torch.float32, torch.float64) else HALF
    if not (error <= tolerance * wanted.abs().max() and error <= 0.1 * told):
        return f"{name} does not continue it exactly (its states differ by {float(error):.1g})"
    return None


def _run(decoder: PreTrainedModel, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """The states [B, T, D] of some tokens after those in the cache, and the cache after them."""
    name = _states_argument(decoder)
    before = {} if cache is None else {name: cache}
    output = decoder(input_ids=ids, use_cache=True, **before)
    if getattr(output, name, None) is None:
        raise ValueError(f"it returns no {name}")
    return output.last_hidden_state, output[name]


def _states_argument(decoder: nn.Module) -> str | None:
    taken = inspect.signature(decoder.forward).parameters
    return next((name for name in STATES if name in taken), None)


def _copies(cache: Any, count: int, device: torch.device) -> Any:
    """What one sequence left, for `count` of them."""
    rows = torch.zeros(count, dtype=torch.long, device=device)
    if isinstance(cache, list | tuple):  # RWKV's
        return [each.index_select(0, rows) for each in cache]
    copied = copy.deepcopy(cache)
    copied.reorder_cache(rows)
    return copied


@contextmanager
def _as_sampling(decoder: nn.Module) -> Iterator[None]:
    """In evaluation mode: checkpointed layers drop the cache in training mode."""
    training = [module for module in decoder.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

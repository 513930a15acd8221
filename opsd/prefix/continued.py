"""Shares prefixes through their cache: keys, values, and states of recurrent layers.

A prefix runs once, without gradients (the teacher's) in chunks. Its cache is copied for each of its
rollouts, which continue it in one batch; gradients flow back through the copies. This is for models
that cannot run packed streams, such as those with linear attention or state-space layers. They need
a cache that several tokens at once can continue: some layers read their state for single tokens
only, which is found out by trying.
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
from opsd.models.head import (
    counts_router_logits,
    decoder_of,
    embedding_rows,
    is_checkpointed,
    is_split,
)
from opsd.prefix.layout import CheckedGroup
from opsd.prefix.packed_forward import scaled_by_length

STATES = ("past_key_values", "cache", "cache_params", "state")
"""transformers' names for a sequence's cache: a decoder's argument and output of the same name."""

CHUNK = 4096
"""Tokens of a prefix that run at once, so that a long prefix needs memory only for its cache."""

ROUNDING, HALF = 5e-6, 0.05
"""The largest change of a state by rounding, relative to the largest state, in fp32 and in 16 bits.
If a layer ignores its state, others change by 1e-5 and more, even with random weights."""


class Continuation:
    """A prefix that has run: its cache, and the state [D] that predicts the next token."""

    def __init__(self, model: PreTrainedModel, prefix: Tensor):
        self.decoder, self.cache = decoder_of(model), None
        with _as_sampling(self.decoder):
            size = len(prefix) if torch.is_grad_enabled() else CHUNK
            for chunk in prefix.to(model.device).split(size):
                states, self.cache = _run(self.decoder, chunk[None], self.cache)
        self.last = states[0, -1]

    def states(self, rollouts: Sequence[Tensor]) -> list[Tensor]:
        """The states [R, D] that predict each rollout's tokens."""
        longest = max(map(len, rollouts)) - 1
        if not longest:
            return [self.last[None]] * len(rollouts)
        # Padding is at the right end, so it changes neither attention nor states of the tokens.
        ids = nn.utils.rnn.pad_sequence([r[:-1] for r in rollouts], batch_first=True)
        copies = _copies(self.cache, len(rollouts), self.last.device)
        with _as_sampling(self.decoder):
            states, _ = _run(self.decoder, ids.to(self.last.device), copies)
        rows = zip(states, rollouts, strict=True)
        return [torch.cat([self.last[None], row[: len(ids) - 1]]) for row, ids in rows]


def continued_hidden_states(
    model: PreTrainedModel, groups: Sequence[CheckedGroup], prefixes: Sequence[Continuation | None]
) -> Tensor:
    """The states [Σ R, D] that predict the rollouts' tokens; each prefix runs once.

    prefixes: those that have already run.
    """
    found: list[Tensor] = []
    for (prefix, rollouts), ran in zip(groups, prefixes, strict=True):
        found += (ran or Continuation(model, prefix)).states(rollouts)
    return torch.cat(found)


def uncontinuable(model: PreTrainedModel, trains: bool = False) -> str | None:
    """Why rollouts cannot continue a prefix's cache; None if they can. trains: with gradients."""
    decoder = decoder_of(model)
    if trains and (is_split(model) or counts_router_logits() or is_checkpointed(decoder)):
        return "weights that are split, checkpointed layers and the routers' loss need whole rows"
    known = _known.setdefault(decoder, {})
    if trains not in known:
        try:
            # Autocast would cache the weights that it casts here, without a graph.
            with torch.autocast(model.device.type, enabled=False), torch.set_grad_enabled(trains):
                known[trains] = _obstacle(model)
        except Exception as error:  # the model's own code may raise anything
            known[trains] = f"{type(decoder).__name__} cannot continue it ({in_short(error)})"
    return known[trains]


_known: WeakKeyDictionary[nn.Module, dict[bool, str | None]] = WeakKeyDictionary()


def _obstacle(model: PreTrainedModel) -> str | None:
    """Try two rollouts: compare their states with those of whole sequences, and the gradients of
    the prefix's embeddings. The error must be small against what the prefix changes."""
    decoder = decoder_of(model)
    name = type(decoder).__name__
    if _states_argument(decoder) is None:
        return f"{name} takes no cache"
    if any(getattr(module, "indexer", None) is not None for module in decoder.modules()):
        return f"{name} chooses keys by their scores, and rounding changes which"
    if scaled := scaled_by_length(decoder.config):
        return f"{name} scales its positions ({scaled}) by a batch's longest"
    ids = torch.arange(3, 24) % embedding_rows(model)
    prefix, rollouts = ids[:9], list(ids[9:].view(2, 6))
    with _as_sampling(decoder, True), _embeddings(decoder) as embedded:
        ran = Continuation(model, prefix)
        _, again = ran.states(rollouts), ran.states(rollouts)  # the first must not change the cache
        found = torch.stack(again).float()
        whole = torch.stack([torch.cat([prefix, own[:-1]]) for own in rollouts]).to(model.device)
        wanted = decoder(input_ids=whole, use_cache=False).last_hidden_state[:, 8:].float()
        bare = decoder(input_ids=whole[:, 9:], use_cache=False).last_hidden_state.float()
    tolerance = ROUNDING if model.dtype in (torch.float32, torch.float64) else HALF
    error, largest = _apart(found, wanted)
    told, _ = _apart(bare, wanted[:, 1:])  # how much the prefix changes them
    if not (error <= tolerance * largest and error <= 0.1 * told):
        return f"{name} does not continue it exactly (its states differ by {error:.1g})"
    if found.requires_grad:
        weights = torch.arange(found.numel(), device=found.device).cos().view_as(found)
        (continued,) = torch.autograd.grad((found * weights).sum(), embedded[0])
        (separate,) = torch.autograd.grad((wanted * weights).sum(), embedded[3])
        error, largest = _apart(continued[0], separate[:, :9].sum(0))
        if not error <= 2 * tolerance * largest:
            return f"{name} continues it with other gradients (they differ by {error:.1g})"
    return None


def _apart(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The largest difference, and the largest of the other."""
    return float((one - other).detach().abs().max()), float(other.detach().abs().max())


@contextmanager
def _embeddings(decoder: PreTrainedModel) -> Iterator[list[Tensor]]:
    """A context that keeps the embeddings of each forward, with gradients if they are enabled."""
    kept: list[Tensor] = []

    def keep(module, inputs, output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            output = output.detach().requires_grad_()
        kept.append(output)
        return output

    with decoder.get_input_embeddings().register_forward_hook(keep):
        yield kept


def _run(decoder: PreTrainedModel, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Run tokens after those in the cache. Returns their states [B, T, D] and the new cache."""
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
    """Repeat one sequence's cache for `count` sequences."""
    rows = torch.zeros(count, dtype=torch.long, device=device)
    if isinstance(cache, list | tuple):  # RWKV's
        return [each.index_select(0, rows) for each in cache]
    trains = torch.is_grad_enabled()
    # Tensors with a graph cannot be copied by deepcopy; reorder_cache makes others of them.
    copied = copy.deepcopy(cache, {id(t): t for t in _tensors(cache)} if trains else None)
    copied.reorder_cache(rows)
    for layer in copied.layers if trains else ():
        if hasattr(layer, "update_recurrent_state"):  # in place, but backward needs what was there
            layer.update_recurrent_state = lambda states, *_, **__: states
    return copied


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a cache, in its lists, dicts and layers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)
    elif hasattr(value, "update") or hasattr(value, "update_conv_state"):
        yield from _tensors(vars(value))


@contextmanager
def _as_sampling(decoder: nn.Module, always: bool = False) -> Iterator[None]:
    """A context in evaluation mode, in passes without gradient: in training mode, checkpointed
    layers drop the cache."""
    off = always or not torch.is_grad_enabled()
    training = [module for module in decoder.modules() if module.training and off]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

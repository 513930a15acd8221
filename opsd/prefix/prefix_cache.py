"""Prefixes that serve several micro-batches, run once for all of them, exactly.

Where a group's rollouts do not fit a micro-batch together, its prefix would run again in each. It
need not: the keys and values of all its tokens but the last are kept as leaves of autograd. Each
micro-batch runs [last token | some rollouts], which read them as a past, and its backward adds to
the leaves' gradients. When the last has been, one backward through the prefix's own graph starts
from these. What is held meanwhile, beside the prefix's activations, are the leaves' gradients.

Where nothing trains, as with most teachers, keys and values are all there is to keep.
"""

from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd.models.lora import adapter_state
from opsd.prefix.layout import Layout
from opsd.prefix.packed_forward import Keep, Kept, run

Ids = tuple[int, ...]


@dataclass(frozen=True)
class _Prefix:
    """A prefix that has run: what its micro-batches read, and where their gradients go on."""

    leaves: Kept
    roots: Kept

    def backward(self) -> None:
        """From the leaves' gradients through the prefix's own graph."""
        pairs = [
            (root, leaf.grad)
            for module, leaves in self.leaves.items()
            for root, leaf in zip(self.roots[module], leaves, strict=True)
            if leaf.grad is not None
        ]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))


class PrefixCache:
    """The prefixes that several of a step's micro-batches have.

    `training` are those that are kept where they train.

    Args:
        batches: the prefixes of each micro-batch, in the order in which they will run. Kept are
            those that several have which follow each other.
        training: those that may be kept where they train; others run again in each.
    """

    def __init__(self, batches: Sequence[Collection[Ids]], training: Collection[Ids]):
        numbers: dict[Ids, list[int]] = {}
        for number, batch in enumerate(batches):
            for ids in batch:
                numbers.setdefault(ids, []).append(number)
        # The number of the last batch that has each.
        self._last = {
            ids: found[-1]
            for ids, found in numbers.items()
            if len(found) > 1 and found[-1] - found[0] == len(found) - 1 and len(ids) > 1
        }
        self.training = self._last.keys() & set(training)
        self._done = -1
        self._run: dict[tuple[nn.Module, Ids, bool, Hashable], _Prefix] = {}

    def batch_done(self) -> None:
        """A micro-batch's backward has been: that of the prefixes whose last it was follows."""
        self._done += 1
        for key in [key for key in self._run if self._last[key[1]] <= self._done]:
            self._run.pop(key).backward()

    def __contains__(self, ids: Ids) -> bool:
        return ids in self._last

    def past(self, model: PreTrainedModel, ids: Ids) -> Kept | None:
        """Keys and values of all tokens but the last; None where this prefix is not kept."""
        trains = torch.is_grad_enabled()
        if ids not in self or (trains and ids not in self.training):
            return None
        key = model.get_decoder(), ids, trains, adapter_state(model)
        if key not in self._run:
            self._run[key] = _run_prefix(model, ids)
        return self._run[key].leaves


def cached_token_cost(model: PreTrainedModel) -> float:
    """What a kept token holds more than one that runs, in activations of a token that runs.

    Of a layer: the gradients of its keys and values, beside some 8 D + 4 I numbers (its norms,
    queries, attention and products with a feed-forward of width I); where it is checkpointed, its
    keys and values as well, beside its input D alone.
    """
    config = model.get_decoder().config
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    pair = 2 * head * (getattr(config, "num_key_value_heads", None) or heads)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return 2 * pair / width
    return pair / (8 * width + 4 * config.intermediate_size)


def _run_prefix(model: PreTrainedModel, ids: Ids) -> _Prefix:
    if torch.is_grad_enabled():
        _refuse_reentrant(model)
    roots: Kept = {}
    # As a group of its own, with a rollout of one token, which is only a target.
    layout = Layout([(ids[:-1], [ids[-1:]])], model.device)
    run(model, layout, keep=Keep(roots, graph=True))
    leaves = {
        module: tuple(x.detach().requires_grad_(x.requires_grad) for x in pair)
        for module, pair in roots.items()
    }
    return _Prefix(leaves, roots)


def _refuse_reentrant(model: PreTrainedModel) -> None:
    for module in model.get_decoder().modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        active = getattr(module, "gradient_checkpointing", False) and module.training
        if active and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "gradient checkpointing has use_reentrant=True: keys and values inside it have no "
                "graph, so a prefix cannot be kept for several micro-batches; use False"
            )


_kept: PrefixCache | None = None


@contextmanager
def using_cache(prefixes: PrefixCache) -> Iterator[PrefixCache]:
    """Streams that run inside, of any model, read these prefixes instead of running them again."""
    global _kept
    before, _kept = _kept, prefixes
    try:
        yield prefixes
    finally:
        _kept = before


def without_kept(
    model: PreTrainedModel, groups: list[tuple[Tensor, list[Tensor]]]
) -> tuple[list[tuple[Tensor, list[Tensor]]], list[int], Kept | None]:
    """What is left of the groups' prefixes to run; of each, how many tokens are kept; their past.

    The past of all groups stands in their order.
    """
    pasts = [_kept and _kept.past(model, tuple(prefix.tolist())) for prefix, _ in groups]
    found = [past for past in pasts if past]
    if not found:
        return groups, [0] * len(groups), None
    lengths = [
        len(prefix) - 1 if past else 0 for (prefix, _), past in zip(groups, pasts, strict=True)
    ]
    rest = [(prefix[n:], rollouts) for (prefix, rollouts), n in zip(groups, lengths, strict=True)]
    joined = {
        module: tuple(map(torch.cat, zip(*(past[module] for past in found), strict=True)))
        for module in found[0]
    }
    return rest, lengths, joined


def keeps_any(groups: list[tuple[Tensor, list[Tensor]]]) -> bool:
    """Whether a prefix of these is one to keep."""
    return _kept is not None and any(tuple(p.tolist()) in _kept for p, _ in groups)

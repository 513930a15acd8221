"""Runs a prefix that several micro-batches share once for all of them, without approximation.

If a group's rollouts do not fit into one micro-batch, its prefix would run again in each. Instead
the keys and values of all its tokens but the last are kept as autograd leaves. Each micro-batch
runs [last token | some rollouts], which attend to them, and its backward adds to the leaves'
gradients. After the last micro-batch, one backward through the prefix's own graph starts from those
gradients. Until then the prefix's activations and the leaves' gradients stay in memory.

Without gradients, as for most teachers, only the keys and values are kept. They are computed in
chunks, so that a long prefix needs memory only for them.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd.common.system import trim_heap
from opsd.models.head import attention_shapes, decoder_of
from opsd.models.images import ImageIds
from opsd.prefix.continued import CHUNK, Continuation
from opsd.prefix.layout import CheckedGroup, Group, Ids, Layout
from opsd.prefix.packed_forward import Capture, KeysAndValues, adapter_state, packed_forward


@dataclass(frozen=True)
class _PrefixRun:
    """The result of a prefix's forward: the leaves that micro-batches read, and the same tensors in
    the prefix's own graph."""

    leaves: KeysAndValues
    in_graph: KeysAndValues

    def backward(self) -> None:
        """Run backward through the prefix's own graph, from the gradients of the leaves."""
        pairs = [
            (tensor, leaf.grad)
            for module, leaves in self.leaves.items()
            for tensor, leaf in zip(self.in_graph[module], leaves, strict=True)
            if leaf.grad is not None
        ]
        if pairs:
            tensors, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(tensors, gradients)


class CachedPrefix(Sequence[int]):
    """The ids of a prefix that several micro-batches share. It replaces plain ids in a group.

    `trains`: it may be read with gradients; otherwise the prefix runs again there.
    """

    def __init__(self, ids: Ids, trains: bool):
        # The numbers of a tensor, as a list, would be tensors again, each half a kilobyte.
        self.ids = ids if isinstance(ids, Tensor | ImageIds) else list(ids)
        self.trains = trains
        self._runs: dict[tuple[nn.Module, bool, Hashable], _PrefixRun] = {}
        self._continuations: dict[tuple[nn.Module, Hashable], Continuation] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index):
        return self.ids[index]

    def keys_and_values(self, model: PreTrainedModel) -> KeysAndValues | None:
        """The keys and values of all tokens but the last, computed by the first call. None if a
        gradient is needed and this prefix does not train."""
        with_gradient = torch.is_grad_enabled()
        if with_gradient and not self.trains:
            return None
        key = decoder_of(model), with_gradient, adapter_state(model)
        if key not in self._runs:
            self._runs[key] = _run_prefix(model, self.ids)
        return self._runs[key].leaves

    def continuation(self, model: PreTrainedModel) -> Continuation:
        """Its `Continuation`, for a model without packed streams; the first call runs it."""
        key = decoder_of(model), adapter_state(model)
        if key not in self._continuations:
            self._continuations[key] = Continuation(model, torch.as_tensor(self.ids))
        return self._continuations[key]

    def finish(self) -> None:
        """Run the prefix's own backward, after the last micro-batch's, and free everything."""
        self._continuations.clear()
        while self._runs:
            self._runs.pop(next(iter(self._runs))).backward()


class PrefixCache:
    """The cached prefixes of one update, each with the last micro-batch that reads it."""

    def __init__(self) -> None:
        self.prefixes: list[CachedPrefix] = []
        self._last_batches: list[int] = []
        self._done = 0  # number of finished micro-batches

    def add(self, ids: Ids, trains: bool, last_batch: int) -> CachedPrefix:
        """Make a prefix for the micro-batches up to number `last_batch`."""
        self.prefixes.append(CachedPrefix(ids, trains))
        self._last_batches.append(last_batch)
        return self.prefixes[-1]

    def batch_done(self) -> None:
        """To call after a micro-batch's backward: finishes the prefixes that no later one reads."""
        for prefix, last in zip(self.prefixes, self._last_batches, strict=True):
            if last == self._done:
                prefix.finish()
        self._done += 1


def cached_token_cost(model: PreTrainedModel) -> float:
    """The additional memory of a cached token, in units of one token's activations.

    In each layer it is the gradients of the token's keys and values. Activations are some 8 D + 4 I
    numbers (norms, queries, attention, and the products with a feed-forward layer of width I). A
    checkpointed layer has activations of only D numbers, and keeps the keys and values as well.
    """
    config = decoder_of(model).config
    width, shapes = config.hidden_size, attention_shapes(config)
    pair = sum(2 * key_heads * head for _, key_heads, head in shapes) / len(shapes)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return 2 * pair / width
    inner = getattr(config, "intermediate_size", None) or 4 * width  # GPT-2 has no such field
    inner = sum(inner) / len(inner) if isinstance(inner, list) else inner  # a layer's, in Gemma 3n
    return pair / (8 * width + 4 * inner)


def plain_groups(groups: Sequence[Group]) -> list[Group]:
    """Replace cached prefixes in the groups by their ids."""
    return [(p.ids if isinstance(p, CachedPrefix) else p, rollouts) for p, rollouts in groups]


def uncached(
    model: PreTrainedModel, groups: Sequence[Group], checked: Sequence[CheckedGroup]
) -> tuple[list[CheckedGroup], list[int], list[KeysAndValues]]:
    """The part of `checked`, the tensors of `groups`, that is not cached and must run; the number
    of cached tokens of each prefix; and the cached keys and values, in the groups' order."""
    cached = [p.keys_and_values(model) if isinstance(p, CachedPrefix) else None for p, _ in groups]
    lengths = [
        0 if each is None else len(prefix) - 1
        for (prefix, _), each in zip(checked, cached, strict=True)
    ]
    rest = [(prefix[n:], rollouts) for (prefix, rollouts), n in zip(checked, lengths, strict=True)]
    return rest, lengths, [each for each in cached if each is not None]


def _run_prefix(model: PreTrainedModel, ids: Ids) -> _PrefixRun:
    if torch.is_grad_enabled():
        _refuse_reentrant(model)
    in_graph: KeysAndValues = {}
    images = [ids if isinstance(ids, ImageIds) else None]
    # A prefix with images runs at once: each chunk would run the vision tower again.
    size = len(ids) if torch.is_grad_enabled() or images[0] is not None else CHUNK
    for start in range(0, len(ids) - 1, size):
        chunk, before = ids[start : min(start + size, len(ids) - 1)], in_graph
        in_graph = {}
        # A group with a rollout of one token, which is only a target and is not run.
        layout = Layout([(chunk, [ids[-1:]])], model.device, [start], images)
        capture = Capture(in_graph, graph=True)
        packed_forward(model, layout, capture=capture, past=[before] if before else ())
        if size < len(ids):  # the next chunk's tiles are larger, and fit into no gap of this one's
            trim_heap()
        while before:  # free each tensor after its copy, so that both are never complete
            module, pairs = before.popitem()
            (k, v), (more_k, more_v) = pairs, in_graph[module]
            in_graph[module] = torch.cat((k, more_k)), torch.cat((v, more_v))

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.requires_grad)

    leaves = {module: (leaf(keys), leaf(values)) for module, (keys, values) in in_graph.items()}
    return _PrefixRun(leaves, in_graph)


def _refuse_reentrant(model: PreTrainedModel) -> None:
    for module in decoder_of(model).modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        active = getattr(module, "gradient_checkpointing", False) and module.training
        if active and getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "gradient checkpointing has use_reentrant=True: keys and values inside it have no "
                "graph, so a prefix cannot be cached for several micro-batches; use False"
            )

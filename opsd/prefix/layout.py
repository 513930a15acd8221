"""The layout of a packed stream: each token's position, and the tokens it may attend to.

A stream holds all prefixes, then all rollouts: [prefix 1 | prefix 2 | … | rollout 1.1 | …]. A
rollout's tokens attend to its prefix and causally to themselves, and their positions continue after
the prefix. There is no padding. Keys that ran in another stream, a past, come before the stream's
own. The kernels decide how attention is computed.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opsd.models.images import ImageIds

Ids = Sequence[int]

Group = tuple[Tensor | Ids, Sequence[Tensor | Ids]]
"""(prefix ids [P], [rollout ids [R_1], …])"""

CheckedGroup = tuple[Tensor, list[Tensor]]
"""A group as int64 tensors on the CPU."""


@dataclass(frozen=True)
class Span:
    """Rows `start` to `start + length`; the first has `position` in its sequence."""

    start: int
    length: int
    position: int

    @property
    def end(self) -> int:
        """The position after its last row."""
        return self.position + self.length

    def since(self, position: int) -> "Span":
        """The part of the span from `position` on."""
        cut = max(0, position - self.position)
        return Span(self.start + cut, self.length - cut, self.position + cut)


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of the stream, a prefix or a rollout, and the spans of earlier keys."""

    queries: Span
    before: tuple[Span, ...] = ()


def positions_of(spans: Sequence[Span]) -> Tensor:
    """The spans' positions, concatenated."""
    return torch.cat([torch.arange(s.position, s.end) for s in spans])


class Scores(NamedTuple):
    """How attention scores are computed: scale · q · k, then softcap · tanh(score / softcap).

    window: the number of positions that a query sees, with its own; None: all before it. sinks: a
    score for each query head [H] that is in the softmax but has no value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class Layout:
    """The packed stream of some groups.

    Attributes:
        ids: [T], the prefixes, then the rollouts without their last tokens, which are only targets.
        positions: [T], each token's position in its own sequence.
        predictors: [Σ R], the row whose hidden state predicts each rollout token.
        segments: the prefixes, then the rollouts that have a token to run.
        groups: the number of groups, and so of segments that are prefixes.
        past: the number of key rows before the stream's own.
        images: for each group, its whole context where that has images.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        device: torch.device,
        past: Sequence[int] | None = None,
        images: Sequence[ImageIds | None] | None = None,
    ):
        """Lay out `groups` on `device`.

        `past`: for each group, how many tokens before its prefix ran in another stream. Their keys
        come before the stream's own, group by group.
        """
        checked = checked_groups(groups)
        past = past or [0] * len(checked)
        self.groups, self.past = len(checked), sum(past)
        self.images = images or [None] * len(checked)
        self.segments: list[Segment] = []
        self._parents: list[Segment] = []  # of the rollouts
        start = past_start = 0
        for (prefix, _), length in zip(checked, past, strict=True):
            before: tuple[Span, ...] = (Span(past_start, length, 0),) if length else ()
            self.segments.append(Segment(Span(start, len(prefix), length), before))
            start += len(prefix)
            past_start += length
        predictors = []
        for parent, (_, rollouts) in zip(list(self.segments), checked, strict=True):
            before = (*parent.before, self.key_rows(parent.queries))
            for ids in rollouts:
                last = torch.tensor([parent.queries.start + parent.queries.length - 1])
                predictors += [last, torch.arange(start, start + len(ids) - 1)]
                if len(ids) > 1:
                    queries = Span(start, len(ids) - 1, parent.queries.end)
                    self.segments.append(Segment(queries, before))
                    self._parents.append(parent)
                    start += len(ids) - 1
        prefixes = [prefix for prefix, _ in checked]
        rollouts = [ids[:-1] for _, own in checked for ids in own]
        self.ids = torch.cat([*prefixes, *rollouts]).to(device)
        self.positions = positions_of([segment.queries for segment in self.segments]).to(device)
        self.predictors = torch.cat(predictors).to(device)
        self.device = device
        self._made: dict[Hashable, Any] = {}

    def rollouts_of(self, group: int) -> list[Span]:
        """The rows of a group's rollouts."""
        parent, rollouts = self.segments[group], self.segments[self.groups :]
        pairs = zip(rollouts, self._parents, strict=True)
        return [rollout.queries for rollout, its in pairs if its is parent]

    def key_rows(self, span: Span) -> Span:
        """Convert rows of the stream to rows of keys, which begin with the past's."""
        return Span(span.start + self.past, span.length, span.position)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Call `make` once for a key and cache its result, which all layers use."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def checked_groups(groups: Sequence[Group]) -> list[CheckedGroup]:
    """Convert the groups to int64 tensors on the CPU. Raises ValueError for invalid groups."""
    checked = [(_ids(prefix), [_ids(ids) for ids in rollouts]) for prefix, rollouts in groups]
    if not checked:
        raise ValueError("groups is empty: it must hold (prefix ids, [rollout ids, …])")
    for number, (prefix, rollouts) in enumerate(checked):
        if not len(prefix):
            raise ValueError(f"groups[{number}] has an empty prefix: it must hold a token at least")
        if not len(rollouts) or not all(map(len, rollouts)):
            raise ValueError(
                f"groups[{number}] has rollouts of lengths {[len(ids) for ids in rollouts]}: it "
                "must have a rollout, and each a token at least"
            )
    return checked


def contexts_with_images(groups: Sequence[Group]) -> list[ImageIds | None]:
    """Each group's prefix if it has images, also if it is cached; otherwise None."""
    prefixes = [getattr(prefix, "ids", prefix) for prefix, _ in groups]
    return [prefix if isinstance(prefix, ImageIds) else None for prefix in prefixes]


def _ids(ids: Tensor | Ids) -> Tensor:
    ids = ids if isinstance(ids, Tensor) else torch.tensor(ids, dtype=torch.long)
    if ids.ndim != 1 or (len(ids) and (ids.is_floating_point() or ids.is_complex())):
        raise ValueError(
            f"groups holds a tensor of shape {tuple(ids.shape)} and dtype {ids.dtype}: ids must "
            "be integers in one dimension"
        )
    return ids.cpu().long()

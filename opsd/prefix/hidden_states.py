"""Computes the hidden states that predict rollouts' tokens, for a student and its teachers.

All functions take groups, each (prefix ids [P], [rollout ids [R_1], …]), and return [Σ R, D]: for
each rollout token the last hidden state, after the final norm, that predicts it, in the order
group, rollout, position. The state at position P - 1 predicts the first token of all rollouts of a
prefix. A rollout's last token is only a target and is not run.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from opsd.common.step_timer import phase
from opsd.models.head import decoder_of, embedding_rows, is_split, run_decoder
from opsd.models.remote import RemoteTeacher
from opsd.prefix.continued import CHUNK, continued_hidden_states, uncontinuable
from opsd.prefix.images import whole_hidden_states
from opsd.prefix.layout import CheckedGroup, Group, Layout, checked_groups, contexts_with_images
from opsd.prefix.packed_forward import (
    Capture,
    KeysAndValues,
    adapter_state,
    packed_forward,
    unpackable,
)
from opsd.prefix.prefix_cache import CachedPrefix, plain_groups, uncached


def student_and_teacher_states(
    model: PreTrainedModel,
    student: Sequence[Group],
    teachers: Sequence[tuple[PreTrainedModel, Sequence[Group]]],
    share: bool = True,
) -> tuple[Tensor, list[Tensor]]:
    """The student's states, and those of each teacher in its own contexts.

    A teacher may be `model` itself; no teacher gets a gradient. Where roles use the same model and
    their contexts begin with the same tokens, these tokens run once.
    """
    found: dict[int, Tensor] = {}
    by_model: dict[PreTrainedModel, list[int]] = {}
    for number, (teacher, _) in enumerate(teachers):
        by_model.setdefault(teacher, []).append(number)
    live = by_model.pop(model, [])
    for teacher, numbers in by_model.items():
        roles = [teachers[number][1] for number in numbers]
        with torch.no_grad():
            found.update(zip(numbers, states_by_role(teacher, roles, share), strict=True))
    own, *rest = states_by_role(model, [student, *(teachers[n][1] for n in live)], share)
    found.update(zip(live, rest, strict=True))
    return own, [found[number] for number in range(len(teachers))]


def states_by_role(
    model: PreTrainedModel, roles: Sequence[Sequence[Group]], share: bool = True
) -> list[Tensor]:
    """The states of several roles of one model; only the first role's have a gradient.

    If another role has a group for each of the first's and their prefixes begin with the same
    tokens, these run once: the role reads their keys and values from the first role's pass. A role
    with the same groups as an earlier one does not run, unless weights are split over processes:
    then each role is one forward, whatever its groups. Raises ValueError if adapters are switched
    between the passes.
    """
    if isinstance(model, RemoteTeacher):
        with phase("teacher"):
            return model.states([plain_groups(role) for role in roles])
    new = [n for n, role in enumerate(roles) if not any(_same(role, one) for one in roles[:n])]
    if len(new) < len(roles) and not is_split(model):
        states = dict(zip(new, states_by_role(model, [roles[n] for n in new], share), strict=True))
        first_alike = [next(n for n in new if _same(roles[n], role)) for role in roles]
        return [states[n] if n == k else states[n].detach() for k, n in enumerate(first_alike)]
    first, *others = roles
    checked = _checked(model, plain_groups(first))
    common = [_common_starts(model, first, checked, other) if share else None for other in others]
    most = [max(each, default=0) for each in zip(*filter(None, common), strict=True)]
    captured: KeysAndValues = {}
    capture = None
    # The first role runs first: autocast caches the weights that it casts for all passes, and must
    # cast them with their graph.
    with phase("student" if torch.is_grad_enabled() else "teacher"):
        before = adapter_state(model)
        if any(most):
            layout = Layout(checked, model.device, images=contexts_with_images(first))
            rows = _rows([s.queries.start for s in layout.segments], most)
            capture = Capture(captured, rows.to(model.device))
            found = [packed_forward(model, layout, capture=capture)]
        else:
            found = [rollout_hidden_states(model, first, share)]
    with torch.no_grad(), phase("teacher"):
        for other, lengths in zip(others, common, strict=True):
            if not any(lengths or ()):
                found.append(rollout_hidden_states(model, other, share))
                continue
            rest = [
                (p[c:], ids) for (p, ids), c in zip(_checked(model, other), lengths, strict=True)
            ]
            starts = [sum(most[:number]) for number in range(len(most))]
            taken = _rows(starts, lengths).to(model.device)
            past = {m: (k[taken], v[taken]) for m, (k, v) in captured.items()}
            _check_adapters(before, adapter_state(model))
            layout = Layout(rest, model.device, lengths, contexts_with_images(other))
            found.append(packed_forward(model, layout, past=[past]))
    return found


def _same(one: Sequence[Group], other: Sequence[Group]) -> bool:
    """Whether two roles have the same objects as contexts and rollouts; compares no tokens."""
    return len(one) == len(other) and all(
        a is b and len(its) == len(others) and all(x is y for x, y in zip(its, others, strict=True))
        for (a, its), (b, others) in zip(one, other, strict=True)
    )


def _common_starts(
    model: PreTrainedModel,
    first: Sequence[Group],
    checked: Sequence[CheckedGroup],
    other: Sequence[Group],
) -> list[int] | None:
    """For each group, the length of both prefixes' common start; None if none are shared."""
    unknown = CachedPrefix, FakeTensor  # fake tensors, of `opsd plan`, have no values
    apart = any(isinstance(prefix, unknown) for prefix, _ in [*checked, *first, *other])
    if len(first) != len(other) or apart or unpackable(model) is not None:
        return None
    pairs = list(zip(checked, _checked(model, other), strict=True))
    if any(len(prefix) > CHUNK for _, (prefix, _) in pairs):  # these run in chunks
        return None
    lengths = [_common(one, another) for (one, _), (another, _) in pairs]
    images = zip(contexts_with_images(first), contexts_with_images(other), strict=True)
    return [
        length
        if one is None or another is None or one.images == another.images
        # The same ids may be placeholders of other images.
        else min(length, one.kinds.index(1))
        for length, (one, another) in zip(lengths, images, strict=True)
    ]


def _rows(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Concatenate the ranges from each start with each length."""
    pairs = zip(starts, lengths, strict=False)
    return torch.cat([torch.arange(start, start + length) for start, length in pairs])


def rollout_hidden_states(
    model: PreTrainedModel, groups: Sequence[Group], share: bool = True
) -> Tensor:
    """The states of one model. `share`: run each prefix once, if the model can."""
    if isinstance(model, RemoteTeacher):
        return model.states([plain_groups(groups)])[0]
    if not share:
        return separate_hidden_states(model, groups)
    images = contexts_with_images(groups)
    alone = unpackable(model) if any(images) else _alone_because(model)
    if alone is not None:
        return separate_hidden_states(model, groups)
    checked, given = _checked(model, plain_groups(groups)), [prefix for prefix, _ in groups]
    if unpackable(model) is not None:
        anew = torch.is_grad_enabled()
        cached = [p if isinstance(p, CachedPrefix) and not anew else None for p in given]
        ran = [None if prefix is None else prefix.continuation(model) for prefix in cached]
        return continued_hidden_states(model, checked, ran)
    # Long prefixes run in chunks, to free their activations, if the forwards need no counting.
    if not torch.is_grad_enabled() and not is_split(model):
        whole: list[Any] = [image or p for image, (p, _) in zip(images, checked, strict=True)]
        groups = [
            (g if len(p) <= CHUNK or isinstance(g, CachedPrefix) else CachedPrefix(p, False), r)
            for g, p, (_, r) in zip(given, whole, checked, strict=True)
        ]
    rest, lengths, past = uncached(model, groups, checked)
    return packed_forward(model, Layout(rest, model.device, lengths, images), past=past)


def shared_prefix_hidden_states(model: PreTrainedModel, groups: Sequence[Group]) -> Tensor:
    """The hidden states that predict the rollouts' tokens; each prefix runs once.

    model: a causal language model of transformers, or a PEFT model around one.
    groups: each (prefix ids [P], [rollout ids [R_1], …]), integer tensors or lists.

    Returns [Σ R, D]: row k is the last hidden state, after the final norm, that predicts the k-th
    rollout token (order: group, rollout, position); differentiable in the parameters. The state at
    a prefix's last position predicts the first token of all its rollouts. A rollout's last token is
    only a target and is not run.

    In a model with layers that cannot be packed (recurrent, linear attention) the rollouts continue
    the prefix's cache. If they cannot, each runs by itself, with one warning that names the layer.
    Raises ValueError for empty prefixes or rollouts, for ids without an embedding, and for more
    tokens than the model has positions.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_attention_heads=2, **sizes))
    >>> shared_prefix_hidden_states(model, [([1, 2, 3], [[4, 5], [6]])]).shape
    torch.Size([3, 8])
    """
    reason = _alone_because(model)
    if reason is not None:
        _warn_once(reason)
    return rollout_hidden_states(model, groups)


def _alone_because(model: PreTrainedModel) -> str | None:
    """Why each rollout runs by itself; None if prefixes are shared."""
    reason = unpackable(model)
    continues = reason is not None and uncontinuable(model, torch.is_grad_enabled()) is None
    return None if continues else reason


def separate_hidden_states(model: PreTrainedModel, groups: Sequence[Group]) -> Tensor:
    """The same states, with each rollout in its own padded row after its prefix. After a prefix
    with images, each runs in the whole model's forward."""
    checked = _checked(model, plain_groups(groups))
    images = contexts_with_images(groups)
    if any(images):
        found = []
        for context, (prefix, rollouts) in zip(images, checked, strict=True):
            if context is None:
                found.append(separate_hidden_states(model, [(prefix, rollouts)]))
            else:
                found += [whole_hidden_states(model, context, ids) for ids in rollouts]
        return torch.cat(found)
    rows = [(prefix, ids) for prefix, rollouts in checked for ids in rollouts]
    tokens = [torch.cat([prefix, ids[:-1]]) for prefix, ids in rows]
    # Padding is at the right end, where a causal model cannot see it. So no mask is needed, and
    # fast causal attention can be used.
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(model.device)
    counted, number = torch.zeros_like(ids), 0  # a prefix counts in its first rollout's row
    for prefix, rollouts in checked:
        for own in rollouts:
            counted[number, 0 if own is rollouts[0] else len(prefix) : len(tokens[number])] = 1
            number += 1
    states = run_decoder(decoder_of(model), counted, input_ids=ids)
    places = [
        row * ids.shape[1] + torch.arange(len(prefix) - 1, len(tokens[row]))
        for row, (prefix, _) in enumerate(rows)
    ]
    return states.flatten(0, 1).index_select(0, torch.cat(places).to(ids.device))


def _checked(model: PreTrainedModel, groups: Sequence[Group]) -> list[CheckedGroup]:
    """Check that the groups are valid and that this model can run them.

    Raises ValueError for ids without an embedding, and for more tokens than there are positions.
    """
    checked = checked_groups(groups)
    decoder = decoder_of(model)
    positions = getattr(decoder.config, "max_position_embeddings", None)
    rows = embedding_rows(decoder)
    for number, (prefix, rollouts) in enumerate(checked):
        longest = len(prefix) + max(map(len, rollouts)) - 1
        if positions is not None and longest > positions:
            raise ValueError(
                f"groups[{number}] has a prefix of {len(prefix)} tokens and a rollout of "
                f"{longest + 1 - len(prefix)}: {type(decoder).__name__} has {positions} positions "
                "(max_position_embeddings), and a rollout's last token needs none"
            )
        for ids in (prefix, *rollouts):
            if isinstance(ids, FakeTensor):
                continue  # it has no values (`opsd plan`)
            if int(ids.min()) < 0 or int(ids.max()) >= rows:
                raise ValueError(
                    f"groups[{number}] holds ids from {int(ids.min())} to {int(ids.max())}: "
                    f"{type(decoder).__name__} has embeddings of 0 to {rows - 1}"
                )
    return checked


def _check_adapters(student: tuple[bool, ...], teacher: tuple[bool, ...]) -> None:
    """Raise ValueError if the teacher's adapters differ from the student's, with which the keys
    that it reads were computed: its states would then belong to no model."""
    differ = sum(a != b for a, b in zip(student, teacher, strict=True))
    if differ:
        raise ValueError(
            f"{differ} of {len(student)} adapted layers apply their adapters for one role and not "
            "for the other, which reads its keys and values: switch adapters on or off for a whole "
            "step, or take a teacher of its own weights (opsd.models.lora.without_adapters)"
        )


def _common(student: Tensor, teacher: Tensor) -> int:
    """The length of the common start, without the teacher's last token, which must run."""
    length = min(len(student), len(teacher) - 1)
    differs = (student[:length] != teacher[:length]).nonzero()
    return int(differs[0]) if len(differs) else length


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"{reason}: prefixes are not shared, each rollout runs with its own", stacklevel=3
    )

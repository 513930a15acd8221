"""Makes a decoder's inputs for contexts with images: embeddings, positions, features.

The model's own code computes them from the context alone, without running the decoder, so that
nothing of a model family is implemented here again. In the stream they replace the context's ids.
Attention follows the order of tokens, as in text. The positions in time, height and width rotate
queries and keys; a rollout's positions continue after the largest of its context.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from opsd.models.head import decoder_of
from opsd.models.images import ImageIds, whole_model
from opsd.prefix.layout import Layout

VISUAL, DEEP = "visual_pos_masks", "deepstack_visual_embeds"
"""Qwen3-VL's names for the mask of image tokens, and for features that are added to these after the
first layers: a list of [V, D] for V image tokens."""


@dataclass(frozen=True)
class _Seen:
    """A context of P tokens: its embeddings [P, D], the mask of image tokens [P], and the features
    added to these after the first layers, [V, D] each."""

    embeddings: Tensor
    visual: Tensor | None
    deep: Sequence[Tensor]


def decoder_inputs(model: PreTrainedModel, layout: Layout) -> dict[str, Any]:
    """The arguments of the decoder's forward over a stream with images."""
    embeddings = decoder_of(model).get_input_embeddings()(layout.ids)
    turned = layout.positions.repeat(3, 1)
    visual = torch.zeros_like(layout.ids, dtype=torch.bool)
    deep: list[list[Tensor]] = []
    for number, context in enumerate(layout.images):
        if context is None:
            continue
        span = layout.segments[number].queries
        part = slice(span.position, span.end)  # the part of the context that runs here
        rows = torch.arange(span.start, span.start + span.length, device=layout.device)
        if any(context.kinds[part]) or context.positions is None:
            seen = _see(model, context)
            embeddings = embeddings.index_copy(0, rows, seen.embeddings[part])
            if seen.visual is not None:
                visual[rows] = seen.visual[part]
                before, its = int(seen.visual[: part.start].sum()), int(seen.visual[part].sum())
                deep.append([layer[before : before + its] for layer in seen.deep])
        positions = context.positions.to(layout.device)
        turned[:, rows] = positions[:, part]
        after = int(positions.max()) + 1 - len(context)
        for segment in layout.rollouts_of(number):
            turned[:, segment.start : segment.start + segment.length] += after
    inputs = {
        "inputs_embeds": embeddings[None],
        "position_ids": torch.cat([layout.positions[None], turned])[:, None],
    }
    if deep:
        layers = [torch.cat(layer) for layer in zip(*deep, strict=True)]
        inputs |= {VISUAL: visual[None], DEEP: layers}
    return inputs


def whole_hidden_states(model: PreTrainedModel, context: ImageIds, rollout: Tensor) -> Tensor:
    """The states [R, D] that predict a rollout, from the model's own forward of everything."""
    ids = torch.cat([torch.tensor(context), rollout[:-1]])[None].to(model.device)
    output = whole_model(model)(
        input_ids=ids, use_cache=False, **_inputs(model, context, len(rollout))
    )
    return output.last_hidden_state[0, len(context) - 1 :]


def _inputs(model: PreTrainedModel, context: ImageIds, rollout: int = 1) -> dict[str, Tensor]:
    made = context.inputs(rollout - 1)
    return {name: tensor.to(model.device) for name, tensor in made.items()}


def _see(model: PreTrainedModel, context: ImageIds) -> _Seen:
    """Compute a context's inputs with the model; also sets the context's positions."""
    ids = torch.tensor([list(context)], device=model.device)
    with _held_back(decoder_of(model)) as handed:
        whole_model(model)(input_ids=ids, use_cache=False, **_inputs(model, context))
    context.positions = handed["position_ids"][-3:, 0].cpu()
    visual = handed.get(VISUAL)
    return _Seen(
        handed["inputs_embeds"][0], None if visual is None else visual[0], handed.get(DEEP) or ()
    )


@contextmanager
def _held_back(decoder: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """A context in which the decoder only stores its arguments and returns the embeddings."""
    handed: dict[str, Any] = {}
    own = decoder.__dict__.get("forward")  # accelerate may have set one

    def forward(**arguments: Any) -> BaseModelOutputWithPast:
        handed.update(arguments)
        return BaseModelOutputWithPast(last_hidden_state=arguments["inputs_embeds"])

    decoder.forward = forward  # type: ignore[method-assign]
    try:
        yield handed
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own  # type: ignore[method-assign]

"""The hidden states that predict rollouts' tokens: with shared prefixes, and without."""

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opsd.prefix import prefix_cache as kept
from opsd.prefix.layout import Group, Layout
from opsd.prefix.packed_forward import run
from opsd.prefix.supported_models import groups_of, unpackable


def shared_prefix_hidden_states(model: PreTrainedModel, groups: Sequence[Group]) -> Tensor:
    """The hidden states that predict the rollouts' tokens, each prefix run once.

    model: a causal language model of transformers, or a PEFT model around one.
    groups: (prefix ids [P], [rollout ids [R_1], …]) each, integer tensors or lists.

    Returns [Σ R, D]: row k is the last hidden state, after the final norm, that predicts the k-th
    rollout token (order: group, rollout, position); differentiable in the parameters. The state at
    a prefix's last position predicts the first token of all its rollouts, and the last token of a
    rollout is only a target and is not run.

    A model with layers that cannot be packed (recurrent, linear attention) runs each rollout by
    itself, with one warning that names the layer. Raises ValueError for empty prefixes or rollouts,
    ids without an embedding, and more tokens than the model has positions.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=16, num_attention_heads=2, **sizes))
    >>> shared_prefix_hidden_states(model, [([1, 2, 3], [[4, 5], [6]])]).shape
    torch.Size([3, 8])
    """
    reason = unpackable(model)
    if reason is not None:
        _warn_once(reason)
        return separate_hidden_states(model, groups)
    groups, lengths, past = kept.without_kept(model, groups_of(model, groups))
    return run(model, Layout(groups, model.device, lengths), past=past)


def separate_hidden_states(model: PreTrainedModel, groups: Sequence[Group]) -> Tensor:
    """`shared_prefix_hidden_states`, each rollout in a padded row of its own with its prefix."""
    checked = groups_of(model, groups)
    rows = [(prefix, ids) for prefix, rollouts in checked for ids in rollouts]
    tokens = [torch.cat([prefix, ids[:-1]]) for prefix, ids in rows]
    # Padding stands at the right end, where a causal model cannot see it: no mask, and the fast
    # causal attention.
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(model.device)
    output = model.get_decoder()(input_ids=ids, use_cache=False)
    places = [
        row * ids.shape[1] + torch.arange(len(prefix) - 1, len(tokens[row]))
        for row, (prefix, _) in enumerate(rows)
    ]
    rows = torch.cat(places).to(model.device)
    return output.last_hidden_state.flatten(0, 1).index_select(0, rows)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"{reason}: prefixes are not shared, each rollout runs with its own", stacklevel=3
    )

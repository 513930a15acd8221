"""Decode rollouts for graders and readers: keep the tags of thoughts, even if special tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opsd.data.thoughts import BEGIN, END

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opsd.rollout.base import Rollout


_TAG_TOKEN = re.compile(rf"{BEGIN}|{END}|<\|(?:channel\|?|(?:message|start|end)\|)>", re.IGNORECASE)
"""Special tokens that mark a thought: `<think>` and similar tags, and gpt-oss' channels."""


def completions(
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Sequence[Rollout],
    keep_special_tokens: bool = False,
) -> list[str]:
    """Decode rollouts without special tokens, except those that mark a thought.

    keep_special_tokens: keep all of them except the one that ended the rollout.
    """
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    tags = {i for i, token in added.items() if _TAG_TOKEN.fullmatch(token.content)}
    left_out = frozenset() if keep_special_tokens else special - tags
    texts = []
    for rollout in rollouts:
        ids = rollout.ids[:-1] if rollout.finished else rollout.ids
        if rollout.finished and rollout.ids[-1] not in special:
            ids = rollout.ids  # an ordinary token ended it
        texts.append([token for token in ids if token not in left_out])
    return tokenizer.batch_decode(texts, skip_special_tokens=False)

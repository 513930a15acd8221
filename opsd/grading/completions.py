"""A rollout's text as graders and readers see it, and the part of it that is graded.

One rule for training's reward, the held-out evaluation and `opsd eval`: what follows the thought is
graded; nothing is where a thought was begun and never ended; all of a text without a thought. The
tags of a thought count whether they are text or special tokens.
"""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from opsd.rollout.base import Rollout

_BEGIN = r"<[a-z_:]*think[a-z_]*>|\[THINK\]|<\|channel>|<\|channel\|>(?!final)"
_END = r"</[a-z_:]*think[a-z_]*>|\[/THINK\]|<channel\|>|<\|channel\|>final<\|message\|>"
_STARTS_WITH_A_THOUGHT = re.compile(rf"\s*(?:{_BEGIN})", re.IGNORECASE)
_END_OF_A_THOUGHT = re.compile(_END, re.IGNORECASE)
_TAG_TOKEN = re.compile(rf"{_BEGIN}|{_END}|<\|(?:channel|message|start|end)\|>", re.IGNORECASE)
"""Special tokens that belong to a thought: `<think>` and its kin, and the channels of harmony."""


def final_part(text: str, in_thought: bool = False) -> str:
    """What is graded of a completion.

    in_thought: the context has begun the thought, as some chat templates do.

    >>> final_part("<think>Perhaps \\\\boxed{6}? No.</think>It is \\\\boxed{7}.")
    'It is \\\\boxed{7}.'
    >>> final_part("<think>Perhaps \\\\boxed{6}?")
    ''
    """
    ends = list(_END_OF_A_THOUGHT.finditer(text))
    if ends:
        return text[ends[-1].end() :]
    return "" if in_thought or _STARTS_WITH_A_THOUGHT.match(text) else text


def completions(
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Sequence[Rollout],
    keep_special_tokens: bool = False,
) -> list[str]:
    """The rollouts as text: without special tokens, but for those that mark a thought.

    keep_special_tokens: with all of them, but for the one that ended the rollout.
    """
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    tags = {i for i, token in added.items() if _TAG_TOKEN.fullmatch(token.content)}
    left_out = frozenset() if keep_special_tokens else special - tags
    texts = []
    for rollout in rollouts:
        ids = rollout.ids[:-1] if rollout.finished else rollout.ids
        if rollout.finished and rollout.ids[-1] not in special:
            ids = rollout.ids  # ended by a token that is text
        kept = [token for token in ids if token not in left_out]
        texts.append(tokenizer.decode(kept, skip_special_tokens=False))
    return texts

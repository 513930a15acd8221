"""Where a completion's thought ends, and so which part of it is graded. Needs no torch.

One rule for training's reward, the held-out evaluation and `opsd eval`: what follows the thought is
graded; nothing is where a thought was begun and never ended; all of a text without a thought.
"""

import re

BEGIN = r"<[a-z_:]{0,30}think[a-z_]{0,30}>|\[THINK\]|<\|channel>|<\|channel\|>(?!final)"
END = r"</[a-z_:]{0,30}think[a-z_]{0,30}>|\[/THINK\]|<channel\|>|<\|channel\|>final<\|message\|>"
_STARTS_WITH_A_THOUGHT = re.compile(rf"\s*(?:{BEGIN})", re.IGNORECASE)
_END_OF_A_THOUGHT = re.compile(END, re.IGNORECASE)


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

"""Runs each shared prefix once; its rollouts continue it in one stream of tokens.

Other rooms import all names from here.
"""

from opsd.prefix.attention import by_tiles, use_kernel
from opsd.prefix.continued import uncontinuable
from opsd.prefix.hidden_states import (
    rollout_hidden_states,
    shared_prefix_hidden_states,
    states_by_role,
    student_and_teacher_states,
)
from opsd.prefix.layout import Group, Ids
from opsd.prefix.packed_forward import try_kernel, unpackable
from opsd.prefix.prefix_cache import CachedPrefix, PrefixCache, cached_token_cost

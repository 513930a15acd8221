"""One stream of tokens per context: each shared prefix runs once, its rollouts continue it.

Everything that other rooms need is imported from here.
"""

from opsd.prefix.choose_kernel import use_kernel
from opsd.prefix.hidden_states import separate_hidden_states, shared_prefix_hidden_states
from opsd.prefix.layout import Group
from opsd.prefix.live_teacher import live_hidden_states
from opsd.prefix.packed_forward import try_kernel
from opsd.prefix.prefix_cache import PrefixCache, cached_token_cost, using_cache
from opsd.prefix.supported_models import unpackable

__all__ = [
    "Group",
    "PrefixCache",
    "cached_token_cost",
    "live_hidden_states",
    "separate_hidden_states",
    "shared_prefix_hidden_states",
    "try_kernel",
    "unpackable",
    "use_kernel",
    "using_cache",
]

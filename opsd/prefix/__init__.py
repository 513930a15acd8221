"""One stream of tokens per context: each shared prefix runs once, its rollouts continue it."""

from opsd.prefix.kept import KeptPrefixes, held_per_token, keeping
from opsd.prefix.kernels import use_kernel
from opsd.prefix.layout import Group
from opsd.prefix.roles import live_hidden_states
from opsd.prefix.states import separate_hidden_states, shared_prefix_hidden_states
from opsd.prefix.stream import try_kernel
from opsd.prefix.support import unpackable

__all__ = [
    "Group",
    "KeptPrefixes",
    "held_per_token",
    "keeping",
    "live_hidden_states",
    "separate_hidden_states",
    "shared_prefix_hidden_states",
    "try_kernel",
    "unpackable",
    "use_kernel",
]

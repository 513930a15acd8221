"""Adapts other libraries' calls to `opsd_kernels`: `liger` has the interface of
LigerFusedLinearJSDLoss, `trl` is for TRL's trainers. See docs/adapters.md.

Nothing in opsd_kernels or opsd imports this package. Only here does a number name the divergence:
TRL's and Liger's `beta` is 0 for forward KL and 1 for reverse KL, although the limits of the
generalised JSD there are 0.
"""

from typing import Any


def divergence_of(beta: float) -> dict[str, Any]:
    """Convert TRL's and Liger's `beta` to `linear_divergence`'s arguments. Between 0 and 1 it is
    the teacher's share of the mixture in all three. Raises ValueError for any other number.

    >>> divergence_of(0), divergence_of(0.5)
    ({'divergence': 'forward_kl'}, {'divergence': 'jsd', 'beta': 0.5})
    """
    if beta == 0.0:
        return {"divergence": "forward_kl"}
    if beta == 1.0:
        return {"divergence": "reverse_kl"}
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta: got {beta!r}, must lie between 0 (forward KL) and 1 (reverse KL)")
    return {"divergence": "jsd", "beta": float(beta)}

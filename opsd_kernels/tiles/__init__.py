"""The backends: who turns a tile of logits into per-token numbers and, in place, into gradients.

Each is a module with the same functions on tiles [n, v] of both roles' products,

    normalisers -> sums -> gradient_            of a divergence
    log_prob_normalisers -> log_prob_gradient_  of a log-probability

whose contract is in `tiles/torch.py`; what they know of a token in between is in `state.py`. Which
one serves a call is decided in `resolve.py`.
"""

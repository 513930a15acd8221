"""The backends: they compute per-token numbers from a tile of logits and, in place, gradients.

Each is a module with the same functions on tiles [n, v] of both roles' products,
    normalisers -> sums -> gradient_            of a divergence
    log_prob_normalisers -> log_prob_gradient_  of a log-probability
`tiles/torch.py` has their contract, `state.py` what they store for each token in between, and
`resolve.py` decides which backend computes a call.
"""

"""The backends: who turns a tile of logits into per-token numbers and, in place, into gradients.

Each is a module with two functions on float tiles [n, V] that they may overwrite (see
`tiles/torch.py` for their contract):

    divergence_rows(student, teacher, ..., row_weight, stats, opposed)
    log_prob_rows(logits, bias, targets, transform, row_weight, stats)

and `TILES` = how many rows of V items a token occupies while they work (both roles' tiles
included). Which one serves a call is decided in `resolve.py`.
"""

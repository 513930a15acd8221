"""Rows of several sources, each with a weight, as one training set."""

import random
from collections.abc import Sequence

from opsd.data.rows import Row


def mixture(sources: Sequence[tuple[Sequence[Row], float]], seed: int) -> list[Row]:
    """The rows of all sources, each source's as often as its weight says.

    A weight of 2 has each row twice, one of 0.5 a half of them, drawn by `seed`; 1.5 has all of
    them and a half again. A source of a positive weight keeps one row at least.
    """
    mixed: list[Row] = []
    for number, (rows, weight) in enumerate(sources):
        whole, part = divmod(weight, 1)
        mixed += list(rows) * int(whole)
        count = round(part * len(rows))
        if not whole and not count and weight > 0 and rows:
            count = 1
        chosen = random.Random(f"{seed}:{number}").sample(range(len(rows)), count)
        mixed += [rows[index] for index in sorted(chosen)]
    return mixed

"""Drawn tokens follow the distribution that temperature, top-k and top-p leave."""

import pytest
import torch

from opsd.rollout.base import Sampling
from opsd.rollout.logits_sampling import Draw

LOGITS = torch.tensor([2.0, 0.5, -1.0, -torch.inf, 1.5, 0.0, -30.0])
DRAWS = 40_000


def frequencies(sampling: Sampling) -> torch.Tensor:
    torch.manual_seed(0)
    scores = LOGITS.repeat(DRAWS, 1)
    drawn = Draw(sampling)(torch.zeros(DRAWS, 1, dtype=torch.long), scores)
    assert ((drawn == 0).sum(-1) == 1).all()
    assert (drawn == 0).logical_or(drawn == -torch.inf).all()
    return torch.bincount(drawn.argmax(-1), minlength=len(LOGITS)) / DRAWS


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1), [0, 1, 2, 4, 5, 6]),
        (Sampling(1, temperature=0.5), [0, 1, 2, 4, 5, 6]),
        (Sampling(1, top_k=3), [0, 1, 4]),
        (Sampling(1, top_p=0.75), [0, 4]),  # .496 + .301 is the first sum above .75
        (Sampling(1, temperature=2.0, top_k=4, top_p=0.6), [0, 4]),
    ],
)
def test_tokens_are_drawn_by_their_probability(sampling, kept):
    logits = torch.full_like(LOGITS, -torch.inf)
    logits[kept] = LOGITS[kept] / sampling.temperature
    wanted = logits.softmax(-1)
    # Five standard deviations of a frequency; nothing where the probability is 0.
    bound = 5 * (wanted * (1 - wanted) / DRAWS).sqrt()
    assert ((frequencies(sampling) - wanted).abs() <= bound + 1e-12).all()


def test_a_seed_fixes_the_draws():
    assert torch.equal(frequencies(Sampling(1)), frequencies(Sampling(1)))


def test_scores_are_left_as_they_are():
    scores = LOGITS.repeat(4, 1)
    Draw(Sampling(1, temperature=0.7))(torch.zeros(4, 1, dtype=torch.long), scores)
    assert torch.equal(scores, LOGITS.repeat(4, 1))


@pytest.mark.parametrize("size", [7, 256, 1000])
def test_a_random_number_draws_the_entry_at_its_place_in_the_cumulative_distribution(size):
    """In fp64 over the whole vocabulary. Most entries are impossible, among them whole blocks."""
    torch.manual_seed(0)
    scores = 3 * torch.randn(5000, size)
    scores[:, torch.rand(size) < 0.6] = -torch.inf
    scores[:, size // 3 : size // 3 + 300] = -torch.inf
    cumulative = scores.double().softmax(-1).cumsum(-1)
    torch.manual_seed(1)
    numbers = torch.rand(5000, 1, dtype=torch.float64) * cumulative[:, -1:]
    torch.manual_seed(1)
    drawn = Draw(Sampling(1))(torch.zeros(5000, 1, dtype=torch.long), scores).argmax(-1)
    wanted = torch.searchsorted(cumulative, numbers, right=True)[:, 0]
    near = (cumulative - numbers).abs().amin(-1) < 1e-6  # a bound that rounding may move
    assert near.float().mean() < 0.01 and torch.equal(drawn[~near], wanted[~near])
    assert scores.gather(-1, drawn[:, None]).isfinite().all()

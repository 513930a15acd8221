"""The losses of opsd, sft and grpo, against their formulas written down with full logits."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.training_cases import ROWS, graded, logits, prompts_of
from torch.nn.functional import cross_entropy, kl_div

from opsd.config.loss import LossSection
from opsd.objectives import GRPO, OPSD, SFT, Problem, Totals, samples_of
from opsd.objectives.grpo import group_advantages
from opsd.prefix import rollout_hidden_states
from opsd.quickstart import tiny_model as tiny
from opsd.rollout import Rollout
from opsd.training.teacher_contexts import outcome_measures


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny.make_model(1, tokenizer)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return prompts_of(tokenizer, target="{{ worked }}")


@pytest.fixture(scope="module")
def problems(prompts, tokenizer):
    draw = torch.Generator().manual_seed(0)
    lengths = ((5, 1), (9, 4), (2, 7))

    def rollout(n):
        return Rollout(torch.randint(len(tokenizer), (n,), generator=draw).tolist(), True)

    return [
        Problem(row, prompts.context(row), [rollout(n) for n in pair])
        for row, pair in zip(ROWS, lengths, strict=False)
    ]


def whole_loss(objective, model, problems):
    """The objective's loss of one batch, and its gradient."""
    groups, _ = objective.sample_groups(problems)
    totals = Totals()
    loss = objective.loss(model, groups, totals)
    return loss, torch.autograd.grad(loss, list(model.parameters())), totals


def assert_same(model, ours, by_hand, gradient):
    assert torch.allclose(ours, by_hand, rtol=1e-4, atol=1e-6)
    wanted = torch.autograd.grad(by_hand, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), gradient, wanted, strict=True):
        assert (a - b).norm() <= 2e-4 * b.norm() + 1e-6, name


@pytest.mark.parametrize("share", [False, True])
def test_neither_padding_nor_sharing_changes_a_hidden_state(share, model, problems):
    groups = [(p.context.student, [r.ids for r in p.rollouts]) for p in problems]
    together = rollout_hidden_states(model, groups, share)
    plain = torch.cat([logits(model, context, r) for context, rollouts in groups for r in rollouts])
    assert torch.allclose(model.lm_head(together), plain, atol=2e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("live", [False, True])
def test_opsd_is_the_divergence_over_the_whole_vocabulary(
    live, divergence, temperature, model, problems, tokenizer
):
    teacher = model if live else tiny.make_model(2, tokenizer)
    section = LossSection(divergence=divergence, beta=0.3, temperature=temperature)
    loss, gradient, totals = whole_loss(OPSD(section, teacher), model, problems)
    parts = []
    for p in problems:
        for rollout in p.rollouts:
            with torch.no_grad():
                t = logits(teacher, p.context.teacher, rollout.ids) / temperature
            t, s = t.log_softmax(-1), logits(model, p.context.student, rollout.ids) / temperature
            s = s.log_softmax(-1)
            m = (0.3 * t.exp() + 0.7 * s.exp()).log()
            parts.append(
                {
                    "forward_kl": lambda t=t, s=s: _kl(t, s),
                    "reverse_kl": lambda t=t, s=s: _kl(s, t),
                    "jsd": lambda t=t, s=s, m=m: 0.3 * _kl(t, m) + 0.7 * _kl(s, m),
                }[divergence]()
            )
    by_hand = torch.cat(parts).mean()
    assert_same(model, loss, by_hand, gradient)
    assert totals.tokens == len(torch.cat(parts))
    assert math.isclose(totals.means()["divergence"], by_hand.item(), rel_tol=1e-4)


def _kl(p, q):
    """KL(p ‖ q) of each row, from log-probabilities."""
    return kl_div(q, p, reduction="none", log_target=True).sum(-1)


@pytest.mark.parametrize("roles", [["student"], ["student", "teacher"]])
def test_sft_is_cross_entropy(roles, model, problems, prompts, tokenizer):
    loss, gradient, _ = whole_loss(SFT(LossSection(roles=roles), prompts=prompts), model, problems)
    scores, labels = [], []
    for p in problems:
        target = tokenizer(p.row.columns["worked"], add_special_tokens=False).input_ids
        target = [*target, tokenizer.eos_token_id]
        for role in roles:
            scores.append(logits(model, getattr(p.context, role), target))
            labels += target
    by_hand = cross_entropy(torch.cat(scores), torch.tensor(labels))
    assert_same(model, loss, by_hand, gradient)


def test_grpo_is_the_policy_gradient(model, problems):
    rewards = [1.0, 0.0, 0.5, 0.5, 0.0, 1.0]  # the second problem's are alike: no signal
    problems = graded(problems, rewards)
    objective = GRPO(LossSection())
    groups, measures = objective.sample_groups(problems)
    assert len(samples_of(groups)) == 4 and measures == {"informative_groups": 2 / 3}
    assert outcome_measures(problems) == {
        "reward": 0.5,
        "correct_fraction": 1 / 3,
        "pass_at_k": 2 / 3,
        "format_fraction": 1.0,
    }
    loss, gradient, _ = whole_loss(objective, model, problems)
    tokens = sum(len(r.ids) for p in problems for r in p.rollouts)
    by_hand = torch.zeros(())
    for p, advantages in zip(problems, ((1, -1), (0, 0), (-1, 1)), strict=True):
        for rollout, advantage in zip(p.rollouts, advantages, strict=True):
            log_p = logits(model, p.context.student, rollout.ids).log_softmax(-1)
            own = log_p.gather(1, torch.tensor(rollout.ids)[:, None])
            # The gradient of log p, at the value that the surrogate has: -A a token.
            by_hand = by_hand - advantage * (1 + own - own.detach()).sum() / tokens
    assert_same(model, loss, by_hand, gradient)


def test_group_advantages():
    assert group_advantages([2.0, 2.0], True) == [0.0, 0.0]
    assert group_advantages([1.0, 0.0, 0.0, 1.0], True) == [1, -1, -1, 1]
    assert group_advantages([3.0, 1.0], False) == [1.0, -1.0]


EQUAL = [
    [0.1 + 0.2, 0.3],
    [sum([0.1] * 10), 1.0],
    [1e8, 1e8 + 1e-7],
    [-0.1 - 0.2, -0.3],
    [0.0, -0.0],
]
EQUAL += [[float(np.float32(0.1) * 3), 0.3], [1.0, 1.0 + 2**-23, 1.0 - 2**-24]]
DIFFERENT = [[0, 0, 0, 1], [0, 1e-9], [1e-320, 0], [1e200, -1e200], [0.1, 0.1001], [1, 2, 4, 8.5]]


@pytest.mark.parametrize("rewards", EQUAL)
def test_rewards_that_differ_by_rounding_teach_nothing(rewards):
    """Their standard deviation is rounding too: divided by it, they would be ±1."""
    for scale in (True, False):
        assert group_advantages(rewards, scale) == [0.0] * len(rewards)


@pytest.mark.parametrize("rewards", DIFFERENT)
def test_advantages_are_standard_scores_whatever_their_size(rewards):
    exact = [Fraction(reward) for reward in rewards]
    mean = sum(exact) / len(exact)
    variance = sum((r - mean) ** 2 for r in exact) / len(exact)
    wanted = [math.copysign(math.sqrt((r - mean) ** 2 / variance), r - mean) for r in exact]
    assert group_advantages(rewards, True) == pytest.approx(wanted, rel=1e-9)

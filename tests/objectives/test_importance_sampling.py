"""The correction for an engine's other probabilities: truncated importance ratios."""

import pytest
import torch
from helpers.training_cases import ROWS, changed, graded, logits, prompts_of
from torch.nn.functional import kl_div

from opsd.config.loss import LossSection
from opsd.objectives import GRPO, OPSD, Problem, Totals
from opsd.rollout import Rollout


def corrected_case(student):
    model, tokenizer = student
    prompts = prompts_of(tokenizer)
    draw, problems = torch.Generator().manual_seed(1), []
    for row in ROWS[:2]:
        context, rollouts = prompts.context(row), []
        for length in (5, 3):
            ids = torch.randint(len(tokenizer), (length,), generator=draw).tolist()
            with torch.no_grad():
                own = logits(model, context.student, ids).log_softmax(-1)
            own = own.gather(1, torch.tensor(ids)[:, None])[:, 0]
            noise = torch.randn(length, generator=draw)
            rollouts.append(Rollout(ids, True, (own + noise).tolist()))
        problems.append(Problem(row, context, rollouts))
    return model, problems


def ratios(model, problem, rollout, bound):
    own = logits(model, problem.context.student, rollout.ids).log_softmax(-1)
    own = own.gather(1, torch.tensor(rollout.ids)[:, None])[:, 0]
    return (own - torch.tensor(rollout.sampling_log_probs)).exp().clamp(max=bound).detach(), own


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("method", ["opsd", "grpo"])
@pytest.mark.parametrize("bound", [1.3, None])
def test_tokens_are_weighted_by_truncated_ratios(method, bound, student, files):
    """The loss and its gradient against the formula written down with full logits."""
    model, problems = corrected_case(student)
    loss_section = LossSection(importance_bound=bound)
    rewards = [1.0, 0.0, 0.0, 1.0]
    if method == "opsd":
        objective = OPSD(loss_section, changed(files, seed=5))
    else:
        objective = GRPO(loss_section)
        problems = graded(problems, rewards)
    totals, tokens = Totals(), 16
    groups, _ = objective.sample_groups(problems)
    loss = objective.loss(model, groups, totals)
    found = gradients(model, loss)
    wanted, place, seen = torch.zeros(()), 0, []
    for problem in problems:
        for rollout in problem.rollouts:
            ratio, own = ratios(model, problem, rollout, bound or torch.inf)
            seen.append(ratio)
            ratio = ratio if bound else torch.ones_like(ratio)
            if method == "opsd":
                s = logits(model, problem.context.student, rollout.ids).log_softmax(-1)
                with torch.no_grad():
                    t = logits(objective.teacher, problem.context.teacher, rollout.ids)
                each = kl_div(s, t.log_softmax(-1), reduction="none", log_target=True).sum(-1)
            else:
                each = -(1 + own - own.detach()) * (1.0 if rewards[place] else -1.0)
            wanted = wanted + (ratio * each).sum() / tokens
            place += 1
    assert abs(loss - wanted) < 1e-5
    expected = gradients(model, wanted)
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-8, name
    measures = totals.means()
    if bound is None:
        assert "importance_ratio" not in measures
    else:
        clipped = torch.cat(seen)
        assert measures["importance_truncated_fraction"] == pytest.approx(
            (clipped == bound).float().mean().item()
        )
        assert measures["importance_ratio"] > clipped.mean()
        assert 0 < measures["importance_truncated_fraction"] < 1

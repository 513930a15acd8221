"""teacher.mix: a geometric mixture of teachers, against its dense rendering."""

import json

import pytest
import torch
from helpers import dense_rendering as dense
from helpers.training_cases import ROWS, changed, load_student, logits, prompts_of, short_config
from torch import nn
from transformers import Gemma2Config

from opsd.common.errors import UserError
from opsd.config.loss import LossSection
from opsd.config.sections import MemberSection, TeacherSection
from opsd.models.teacher import Member, check_mixture, make_members
from opsd.objectives import OPSD, Problem, Totals, samples_of
from opsd.rollout import Rollout
from opsd.training.load_data import load_data

ROLLOUTS = ([5, 6, 7, 8], [9, 4, 11], [8, 8], [3, 12, 5, 5, 6])


def problems_for(prompts) -> list[Problem]:
    return [
        Problem(row, prompts.context(row), [Rollout(ids, True) for ids in pair])
        for row, pair in zip(ROWS, (ROLLOUTS[:2], ROLLOUTS[2:]), strict=False)
    ]


def dense_loss(model, members, step, problems, section):
    """p_T ∝ Π p_i^c_i from whole rows of logits; the mean over all tokens."""
    losses, weights = [], []
    for p in problems:
        for rollout in p.rollouts:
            student = logits(model, p.context.student, rollout.ids)
            with torch.no_grad():
                own = [
                    m.coefficient(step) * logits(m.model, p.context.of(m.context), rollout.ids)
                    for m in members
                ]
                teacher = sum(each[:, : student.shape[-1]] for each in own)
            losses.append(
                dense.sampled_token(student, teacher, torch.tensor(rollout.ids), low=0.2, high=0.2)
                if section.divergence == "sampled_token"
                else dense.divergence(student, teacher, section.divergence, section.beta, None)
            )
            weights.append(torch.ones(len(rollout.ids)))
    return dense.step(losses, weights, "token", 6)


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "sampled_token"])
def test_a_mixtures_gradient_is_its_dense_renderings(divergence, bias, files, wider):
    """Members of one head, of another, of another width and a padded vocabulary, and the student
    itself; a contrast, more than 1, and a sum that is not 1."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_student(files)
    other, wide = changed(files, 3), AutoModelForCausalLM.from_pretrained(wider).eval()
    if bias:
        for one in (model, other):
            one.lm_head.bias = nn.Parameter(torch.randn(one.lm_head.weight.shape[0]))
    coefficients = ([1.5, 0.5], -0.4, 0.2, 0.3)
    shown = ("teacher", "hint", "student", "teacher")
    members = [
        Member(made, context, MemberSection(coefficient=c, steps=4 if type(c) is list else None))
        for made, context, c in zip((other, other, wide, model), shown, coefficients, strict=True)
    ]
    prompts = prompts_of(tokenizer, contexts={"hint": "{{ problem }} The result is 17."})
    section = LossSection(divergence=divergence)
    problems, step = problems_for(prompts), 3
    objective = OPSD(section, other, mix=members)
    groups, _ = objective.sample_groups(problems, step)
    assert groups[0].coefficients == [0.75, -0.4, 0.2, 0.3]
    wanted = dense_loss(model, members, step, problems, section)
    theirs = gradient(wanted, model)
    for share in (True, False):
        totals = Totals()
        loss = objective.loss(model, groups, totals, share)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-5)
        assert (gradient(loss, model) - theirs).norm() <= 1e-5 * theirs.norm()
    assert totals.tokens == sum(sample.counted for sample in samples_of(groups))


@pytest.mark.parametrize("bias", [False, True])
def test_coefficients_of_the_data_and_of_each_token(bias, files, monkeypatch):
    """One member's is a column's; the student itself damps the others by its distance from them."""
    model, tokenizer = load_student(files)
    other = changed(files, 3)
    if bias:
        for one in (model, other):
            one.lm_head.bias = nn.Parameter(torch.randn(one.lm_head.weight.shape[0]))
    members = [
        Member(other, "teacher", MemberSection(coefficient="trust")),
        Member(other, "student", MemberSection(coefficient=0.3)),
        Member(model, "student", MemberSection(coefficient=0.8, damping=2)),
    ]
    problems = problems_for(prompts_of(tokenizer))
    for number, p in enumerate(problems):
        p.row.columns["trust"] = 0.4 + 0.5 * number
    objective = OPSD(LossSection(), other, mix=members)
    groups, _ = objective.sample_groups(problems)
    losses, weights = [], []
    for number, p in enumerate(problems):
        for rollout in p.rollouts:
            student = logits(model, p.context.student, rollout.ids)
            own = student.detach()
            rest = (0.4 + 0.5 * number) * logits(other, p.context.teacher, rollout.ids)
            rest = (rest + 0.3 * logits(other, p.context.student, rollout.ids)).detach()
            apart = dense.divergence(own, rest, "jsd", 0.5, None)[:, None]
            alpha = 0.8 * (2 / (1 + torch.exp(-2 * apart)) - 1)
            assert 0.7 > alpha.max() > 1.1 * alpha.min() > 0
            teacher = (1 - alpha) * rest + alpha * own
            losses.append(dense.divergence(student, teacher, "forward_kl", 0.5, None))
            weights.append(torch.ones(len(rollout.ids)))
    wanted = dense.step(losses, weights, "token", 6)
    loss = objective.loss(model, groups, Totals())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    theirs = gradient(wanted, model)
    assert (gradient(loss, model) - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    ("trust", "said"), [(None, "it is None in training row 1"), (-9, "add up")]
)
def test_a_column_of_coefficients_is_looked_at_first(trust, said, files, tmp_path):
    rows = [{**row.columns, "trust": trust} for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mix = [{"coefficient": "trust"}, {"context": "student"}]
    config = short_config(files[0], tmp_path / "rows.jsonl", tmp_path, teacher={"mix": mix})
    with pytest.raises(UserError, match=said):
        load_data(config)


def test_a_mixture_of_one_is_the_teacher(files):
    model, tokenizer = load_student(files)
    other, prompts = changed(files, 3), prompts_of(tokenizer)
    halves = [Member(other, "teacher", MemberSection(coefficient=c)) for c in (0.25, 0.75)]
    losses = []
    for mix in ((), [Member(other, "teacher")], halves):
        objective = OPSD(LossSection(), other, mix=mix)
        groups, _ = objective.sample_groups(problems_for(prompts))
        losses.append(objective.loss(model, groups, Totals()).item())
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-6)


def test_members_of_the_same_weights_are_one_model(files):
    config = short_config(
        *files,
        files[0].parent / "none",
        teacher={"mix": [{"context": "student"}, {}, {"policy": "live"}, {"policy": "ema"}]},
    )
    model, tokenizer = load_student(files)
    shown, average, members = make_members(
        config.teacher, config.model, torch.float32, model, tokenizer, model
    )
    models = [member.model for member in members]
    assert models == [shown, shown, model, average.model]
    assert shown is not model and average.model is not shown


def test_a_soft_cap_is_refused_by_name():
    teacher = TeacherSection(mix=[{"coefficient": 0.5}, {"coefficient": 0.5, "context": "student"}])
    with pytest.raises(UserError, match=r"teacher.mix has 2 members: gemma2 has a soft cap .* 30"):
        check_mixture(teacher, Gemma2Config())
    check_mixture(TeacherSection(), Gemma2Config())

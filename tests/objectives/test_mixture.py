"""teacher.mix: a geometric mixture of teachers, against its dense rendering."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import dense_rendering as dense
from helpers.training_cases import ROWS, changed, load_student, logits, prompts_of, short_config
from torch import nn
from transformers import Gemma2Config

from opsd.common.errors import UserError
from opsd.config.loss import LossSection
from opsd.config.sections import MemberSection, TeacherSection
from opsd.grading.rewards import GradedRollout
from opsd.models.teacher import Member, check_mixture, make_members
from opsd.objectives import GRPO, OPSD, Distill, Problem, Totals, samples_of
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


METHODS = {
    "opsd": (OPSD, {}),
    "distill": (Distill, {"divergence": "jsd"}),
    "grpo": (GRPO, {"distil": 0.7}),  # both losses in one sweep of the head
    "grpo by two sweeps": (GRPO, {"distil": 0.7, "temperature": 1.5}),
    "grpo where all are wrong": (GRPO, {"distil": 0.7, "distil_groups": "all_wrong"}),
    "grpo with a KL": (GRPO, {"distil": 0.7, "kl": 0.2}),
    "rlsd": (GRPO, {"credit": 0.6}),
}
REWARDS = ([1.0, 0.0], [0.0, 0.0])


def dense_mixture(p, members, rollout, step, own, temperature):
    """Σ c_i z_i; the last member damps the others by each token's distance from them."""
    *others, last = members
    each = [(m, logits(m.model, p.context.of(m.context), rollout)) for m in others]
    rest = sum(m.coefficient(step, p.row.columns) * z for m, z in each).detach()
    z = logits(last.model, p.context.of(last.context), rollout).detach()
    apart = dense.divergence(own / temperature, rest / temperature, "jsd", 0.5, None)[:, None]
    alpha = last.coefficient(step) * (2 / (1 + torch.exp(-2 * apart.detach())) - 1)
    assert 0.75 > alpha.max() > alpha.min() > 0
    return (1 - alpha) * rest + alpha * z


def dense_method(model, members, problems, section, step, grpo):
    """The step's loss of a method whose teacher is that mixture."""
    losses, tau = [], section.temperature
    for p, rewards in zip(problems, REWARDS, strict=True):
        differ = len(set(rewards)) > 1
        for rollout, reward in zip(p.rollouts, rewards, strict=True):
            ids, student = torch.tensor(rollout.ids), logits(model, p.context.student, rollout.ids)
            teacher = dense_mixture(p, members, rollout.ids, step, student.detach(), tau)
            kind = section.divergence, section.beta, None
            apart = dense.divergence(student / tau, teacher / tau, *kind)
            if not grpo:
                losses.append(apart)
                continue
            advantage = torch.full((len(ids),), (2.0 * reward - 1) * differ)
            if section.credit and differ:
                how = float(advantage[0]), section.credit, section.credit_clip
                advantage = dense.credited(student, teacher, ids, *how)
            loss = dense.policy_gradient(student, ids, advantage, None, 0.2, 0.2)
            distil = section.distil * (section.distil_groups == "all" or not differ)
            reference = logits(members[0].model, p.context.student, rollout.ids).detach()
            losses.append(
                loss + distil * apart + section.kl * dense.kl_to_reference(student, reference, ids)
            )
    return sum(loss.sum() for loss in losses) / sum(map(len, losses))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_same_mixtures(name, bias, files):
    """A schedule, a column of the data, and damping by the token; of three models and contexts."""
    kind, fields = METHODS[name]
    model, tokenizer = load_student(files)
    other = changed(files, 3)
    if bias:
        for one in (model, other):
            one.lm_head.bias = nn.Parameter(torch.randn(one.lm_head.weight.shape[0]))
    members = [
        Member(other, "teacher", MemberSection(coefficient="trust")),
        Member(other, "student", MemberSection(coefficient=[0.9, 0.1], steps=4)),
        Member(model, "student", MemberSection(coefficient=0.8, damping=2)),
    ]
    problems, step, section = problems_for(prompts_of(tokenizer)), 3, LossSection(**fields)
    for number, (p, rewards) in enumerate(zip(problems, REWARDS, strict=True)):
        p.row.columns["trust"] = 0.4 + 0.5 * number
        outcomes = [GradedRollout("", True, reward, reward == 1) for reward in rewards]
        problems[number] = replace(p, outcomes=outcomes)
    objective = kind(section, other, mix=members)
    groups, _ = objective.sample_groups(problems, step)
    wanted = dense_method(model, members, problems, section, step, kind is GRPO)
    theirs = gradient(wanted, model)
    for share in (True, False):
        loss = objective.loss(model, groups, Totals(), share)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
        assert (gradient(loss, model) - theirs).norm() <= 1e-5 * theirs.norm()


def test_a_members_context_is_the_methods_own(files):
    model, tokenizer = load_student(files)
    prompts, mix = prompts_of(tokenizer), [Member(model, ""), Member(model, "teacher")]
    for kind, role in ((OPSD, "teacher"), (Distill, "student")):
        groups, _ = kind(LossSection(), model, mix=mix).sample_groups(problems_for(prompts))
        contexts = prompts.context(ROWS[0])
        assert groups[0].teachers == [contexts.of(role), contexts.teacher]


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

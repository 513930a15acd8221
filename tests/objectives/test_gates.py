"""Gates and the control variate, against dense renderings."""

import pytest
import torch
from helpers import dense_rendering as dense
from helpers.training_cases import (
    ROWS,
    changed,
    load_student,
    logits,
    prompts_of,
    short_config,
)

from opsd.common.errors import UserError
from opsd.config.loss import GateSection, LossSection
from opsd.objectives import OPSD, Problem, Totals
from opsd.rollout import Rollout, Sampling

ROLLOUTS = ([5, 6, 7, 8], [9, 4, 11], [8, 8], [3, 12, 5, 5, 6])
OWN = """
def weigh(measures, scale):
    return scale * (-measures.student_entropy).exp()
def wrong(measures, scale):
    return measures.gap[1:]
def negative(measures, scale):
    return measures.gap - 100
def broken(measures, scale):
    return 1 / 0
"""


def history(d, scale):
    """DASH, A_n = D_n + λ_n A_{n+1} from the end: what each D_n counts in the sum of all A."""
    passed_on = 1 / (1 + torch.exp(scale * (d - d.mean())))
    return torch.stack([sum(passed_on[j:n].prod() for j in range(n + 1)) for n in range(len(d))])


def dense_gate(name, scale, floor, student, teacher, ids, d):
    """[R], of one rollout's logits."""
    delta = dense.log_p(teacher, ids) - dense.log_p(student, ids)
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)
    own = -(student.softmax(-1) * student.log_softmax(-1)).sum(-1)
    moved = delta.abs()
    raw = {
        "teacher_entropy": torch.exp(-entropy / scale),
        "teacher_unsure": (entropy > scale).float(),
        "gap": 1 / (1 + torch.exp(-scale * delta)),
        "share": 1 + scale * (1 - (moved.cumsum(0) - moved) / moved.sum()),
        "own": scale * torch.exp(-own),
        "history": history(d, scale),
    }[name]
    return floor + (1 - floor) * raw


@pytest.fixture
def own(tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    return str(tmp_path / "mine.py")


def made(files, section, sampling=None):
    model, tokenizer = load_student(files)
    other, prompts = changed(files, 3), prompts_of(tokenizer)
    problems = [
        Problem(row, prompts.context(row), [Rollout(ids, True) for ids in pair])
        for row, pair in zip(ROWS, (ROLLOUTS[:2], ROLLOUTS[2:]), strict=False)
    ]
    objective = OPSD(section, other, sampling=sampling)
    return model, other, problems, objective, objective.sample_groups(problems)[0]


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "sampled_token"])
@pytest.mark.parametrize(
    "gates",
    [
        [("teacher_entropy", 0.7, 0.2)],
        [("teacher_unsure", 2.0, 0.0)],
        [("gap", 1.5, 0.1)],
        [("share", 0.5, 0.0)],
        [("history", 5.0, 0.0)],
        [("gap", 2.0, 0.0), ("own", 3.0, 0.5), ("share", 0.5, 0.0)],
    ],
    ids=str,
)
def test_a_gated_gradient_is_its_dense_renderings(gates, divergence, files, own):
    names = {"own": f"{own}:weigh"}
    asked = [{"gate": names.get(n, n), "scale": scale, "floor": floor} for n, scale, floor in gates]
    section = LossSection(divergence=divergence, gates=asked)
    model, other, problems, objective, groups = made(files, section)
    losses, weights = [], []
    for p in problems:
        for rollout in p.rollouts:
            ids = torch.tensor(rollout.ids)
            student = logits(model, p.context.student, rollout.ids)
            teacher = logits(other, p.context.teacher, rollout.ids).detach()
            if divergence == "sampled_token":
                plain = dense.sampled_token(student, teacher, ids, low=0.2, high=0.2)
                d = dense.log_p(student, ids) - dense.log_p(teacher, ids)
            else:
                d = plain = dense.divergence(student, teacher, divergence, 0.5, None)
            with torch.no_grad():
                gate = torch.ones(len(ids))
                for each in gates:
                    gate *= dense_gate(*each, student, teacher, ids, d)
            losses.append(gate * plain)
            weights.append(torch.ones(len(ids)))
    wanted = dense.step(losses, weights, "token", 6)
    totals = Totals()
    loss = objective.loss(model, groups, totals)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-5)
    theirs = gradient(wanted, model)
    assert theirs.norm() > 1e-3
    assert (gradient(loss, model) - theirs).norm() <= 1e-5 * theirs.norm()
    assert 0 < totals.means()["gate"]


@pytest.mark.parametrize("gates", [[], [{"gate": "gap"}]], ids=["alone", "gated"])
def test_the_forward_kl_where_the_teacher_is_unsure(gates, files):
    """EOPD: KL(S ‖ T) + a KL(T ‖ S) where H_T is above a bound; some tokens of each kind."""
    section = LossSection(divergence="reverse_kl", unsure=0.7, unsure_entropy=2.0, gates=gates)
    model, other, problems, objective, groups = made(files, section)
    losses, weights, unsure = [], [], []
    for p in problems:
        for rollout in p.rollouts:
            ids = torch.tensor(rollout.ids)
            student = logits(model, p.context.student, rollout.ids)
            teacher = logits(other, p.context.teacher, rollout.ids).detach()
            reverse = dense.divergence(student, teacher, "reverse_kl", 0.5, None)
            forward = dense.divergence(student, teacher, "forward_kl", 0.5, None)
            more = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1) > 2.0
            gate = dense_gate("gap", 1.0, 0.0, student, teacher, ids, reverse).detach()
            losses.append((reverse + 0.7 * more * forward) * (gate if gates else 1))
            weights.append(torch.ones(len(ids)))
            unsure += more.tolist()
    assert 0 < sum(unsure) < len(unsure)
    wanted = dense.step(losses, weights, "token", 6)
    loss = objective.loss(model, groups, Totals())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    theirs = gradient(wanted, model)
    assert (gradient(loss, model) - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_control_variate_takes_the_advantages_mean_away(temperature, files):
    """A = log T(y) / S(y) + KL(S ‖ T), at the temperature that drew; its gradient densely."""
    section = LossSection(divergence="sampled_token", control_variate=True)
    sampling = Sampling(6, temperature=temperature)
    model, other, problems, objective, groups = made(files, section, sampling)
    losses, weights = [], []
    for p in problems:
        for rollout in p.rollouts:
            ids = torch.tensor(rollout.ids)
            student = logits(model, p.context.student, rollout.ids) / temperature
            teacher = logits(other, p.context.teacher, rollout.ids).detach() / temperature
            s, t = student.log_softmax(-1), teacher.log_softmax(-1)
            kl = (s.exp() * (s - t)).sum(-1)
            advantage = (dense.log_p(teacher, ids) - dense.log_p(student, ids) + kl).detach()
            # Over all tokens that could have been drawn its mean is 0.
            mean = (s.exp() * (t - s + kl[:, None])).sum(-1)
            assert mean.abs().max() < 1e-4
            losses.append(dense.policy_gradient(student, ids, advantage, None, 0.2, 0.2))
            weights.append(torch.ones(len(ids)))
    wanted = dense.step(losses, weights, "token", 6)
    loss = objective.loss(model, groups, Totals())
    theirs = gradient(wanted, model)
    assert (gradient(loss, model) - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("wrong", r"must return a tensor of shape \[14\]"),
        ("negative", "must return finite numbers of at least 0"),
        ("broken", "raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_gate_of_the_users_that_fails_is_one_line(function, said, files, own):
    section = LossSection(gates=[{"gate": f"{own}:{function}"}])
    model, _, _, objective, groups = made(files, section)
    with pytest.raises(UserError, match=said):
        objective.loss(model, groups, Totals())


def test_neither_a_plan_nor_a_replay_runs_a_gate(files, tmp_path):
    """They may be of a stranger's config."""
    from opsd.plan.memory import Planner
    from opsd.plan.workload import Lengths

    (tmp_path / "mine.py").write_text("raise SystemExit(7)")
    gates = [{"gate": f"{tmp_path / 'mine.py'}:weigh"}, {"gate": "gap"}]
    config = short_config(*files, tmp_path / "run", loss={"gates": gates})
    assert config.loss.without_code().gates == [GateSection(gate="gap")]
    assert Planner(load_student(files)[0].config, Lengths(9, 9, 6), None).memory(config).peak

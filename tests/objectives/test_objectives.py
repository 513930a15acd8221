"""Every method with every teacher, in fp32 and bf16: its gradient against a dense rendering, and
its loss on a fixed batch, which must fall."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from helpers import dense_rendering as dense
from helpers.training_cases import ROWS, logits, short_config, with_old, write_model, write_rows
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from opsd.common.precision import compute_dtype
from opsd.data.prompts import Prompts
from opsd.grading.rewards import GradedRollout
from opsd.models.load import load_model
from opsd.models.teacher import make_teacher
from opsd.objectives import Problem, Totals, make_objective, samples_of
from opsd.objectives.grpo import group_advantages
from opsd.objectives.token_classes import CLASSES, class_table, split_by_class
from opsd.quickstart import tiny_model as tiny
from opsd.rollout import Rollout, Sampling
from opsd_kernels import linear_log_prob

LONGEST = 12
LENGTHS = ((5, 12), (9, 4), (2, 7))
REWARDS = ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))
TEACHERS = ("live", "initial", "ema", "model")


@dataclass(frozen=True)
class Case:
    """A config's `method` and `loss`, and the teachers that it can have; none: it has none."""

    method: str
    loss: dict = field(default_factory=dict)
    teachers: tuple[str, ...] = TEACHERS
    old: bool = False  # with log-probabilities of an older policy

    def __str__(self) -> str:
        return "-".join([self.method, *(f"{k}={v}" for k, v in self.loss.items())])


WEIGHTS = {
    "correct": 1.0,
    "incorrect": 0.25,
    "truncated": 0.5,
    "skip_first": 1,
    "position": [2.0, 0.5],
    "maths": 0.5,
    "special": 0.0,
}
CASES = [
    Case("opsd"),
    Case("opsd", {"divergence": "reverse_kl", "temperature": 0.7}),
    Case("opsd", {"divergence": "jsd", "beta": 0.3}),
    Case("opsd", {"clip": "entry", "clip_threshold": 0.02}),
    Case("opsd", {"clip": "token", "clip_threshold": 0.5}),
    Case("opsd", {"weights": WEIGHTS}),
    Case("opsd", {"aggregation": "rollout"}),
    Case("opsd", {"divergence": "sampled_token", "aggregation": "constant"}),
    Case("opsd", {"divergence": "sampled_token", "epsilon_high": 0.4}, old=True),
    Case("distill", teachers=("model",)),
    Case("distill", {"divergence": "sampled_token"}, teachers=("model",)),
    Case("grpo", teachers=("none",)),
    Case("grpo", {"aggregation": "constant", "scale_advantages": False}, teachers=("none",)),
    Case("grpo", {"epsilon": 0.1, "epsilon_high": 0.28}, teachers=("none",), old=True),
    Case("grpo", {"aggregation": "rollout", "kl": 0.3}, teachers=("initial", "ema", "model")),
    Case("grpo", {"credit": 0.5}),
    Case("grpo", {"distil": 0.7, "divergence": "jsd"}, teachers=("live", "initial", "model")),
    Case("grpo", {"distil": 0.7, "distil_groups": "all_wrong", "kl": 0.1}, teachers=("initial",)),
    Case(
        "grpo", {"distil": 0.7, "kl": 0.2, "importance_bound": None}, teachers=("model",), old=True
    ),
    Case("grpo", {"distil": 0.7, "credit": 0.5, "divergence": "sampled_token"}),
    Case("grpo", {"distil": 0.7, "credit": 0.5}, teachers=("initial",)),
    Case("grpo", {"distil": 0.7, "temperature": 0.6}, teachers=("initial",)),
    Case("grpo", {"distil": 0.7, "divergence": "reverse_kl", "unsure": 0.8}, teachers=("initial",)),
    # SDAR's
    Case("grpo", {"distil": 0.7, "gates": [{"gate": "gap", "scale": 3.0, "floor": 0.1}]}),
    Case("grpo", {"weights": {"truncated": 0.0}}, teachers=("none",)),
    Case("sft", teachers=("none",)),
    Case("sft", {"roles": ["student", "teacher"], "aggregation": "rollout"}, teachers=("none",)),
    Case("sft", {"weights": {"maths": 2.0, "special": 0.5}}, teachers=("none",)),
]
PAIRS = [(case, teacher) for case in CASES for teacher in case.teachers]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The student, another model of a wider head, and the rows."""
    directory = tmp_path_factory.mktemp("base")
    tokenizer = tiny.make_tokenizer()
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 9,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory / "other")
    tokenizer.save_pretrained(directory / "other")
    return write_model(directory / "model"), write_rows(directory / "rows.jsonl")


@pytest.fixture(scope="module")
def make(files, tmp_path_factory):
    """(case, teacher, precision) → config, model, teacher, objective, problems."""

    def made(case: Case, teacher: str, precision: str):
        policy = {"policy": "initial" if teacher == "none" else teacher}
        if teacher == "model":
            policy["path"] = str(files[0].parent / "other")
        config = short_config(
            *files,
            tmp_path_factory.getbasetemp() / "unused",
            method=case.method,
            teacher=policy,
            rollout={"group_size": 2, "max_new_tokens": LONGEST},
            loss=case.loss,
            train={"precision": precision},
        )
        model, tokenizer = load_model(config.model)
        scorer, average = make_teacher(
            config.teacher,
            config.model,
            compute_dtype(config.train.precision),
            model,
            tokenizer,
            model,
        )
        if teacher != "live":  # or the teacher and the student differ in their contexts alone
            move(model)
        if average is not None:
            average.follow(model, 1)
        prompts = Prompts(config.prompts, tokenizer)
        objective = make_objective(case.method, config.loss, scorer, prompts, Sampling(LONGEST))
        return config, model.train(), scorer, objective, problems_for(prompts)

    return made


def move(model) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)


def problems_for(prompts: Prompts) -> list[Problem]:
    draw, problems = torch.Generator().manual_seed(0), []
    for row, lengths, rewards in zip(ROWS, LENGTHS, REWARDS, strict=False):
        rollouts, outcomes = [], []
        for length, reward in zip(lengths, rewards, strict=True):
            ids = torch.randint(len(prompts.tokenizer), (length,), generator=draw).tolist()
            finished = length < LONGEST
            rollouts.append(Rollout(ids, finished))
            outcomes.append(GradedRollout("", finished, reward, reward == 1.0))
        problems.append(Problem(row, prompts.context(row), rollouts, outcomes))
    return problems


def moves(length: int) -> list[float]:
    """Of log-probabilities, to an older policy's: far over the clips or nothing, so that rounding
    does not decide which ratios are clipped."""
    draw = torch.Generator().manual_seed(length)
    return (0.6 * (torch.randint(3, (length,), generator=draw) - 1)).tolist()


def rendered(case: Case, config, model, teacher, problems, prompts: Prompts) -> Tensor:
    """The step's loss, densely."""
    loss = config.loss
    token_losses, weights = [], []
    if case.method == "sft":
        for p in problems:
            target = prompts.target(p.row)
            for role in loss.roles:
                token_losses.append(
                    -dense.log_p(
                        logits(model, getattr(p.context, role), target), torch.tensor(target)
                    )
                )
                weights.append(weight_of(case, prompts, Rollout(target, True), None))
        return dense.step(token_losses, weights, loss.aggregation, LONGEST)
    for p in problems:
        group = [outcome.reward for outcome in p.outcomes]
        advantages = group_advantages(group, loss.scale_advantages)
        switched, wrong = loss.distil_groups == "all_wrong", not any(o.correct for o in p.outcomes)
        if switched and wrong:
            advantages = [0.0] * len(group)
        for rollout, outcome, advantage in zip(p.rollouts, p.outcomes, advantages, strict=True):
            ids = torch.tensor(rollout.ids)
            student = logits(model, p.context.student, rollout.ids)
            size = student.shape[-1]
            seen = p.context.student if case.method == "distill" else p.context.teacher
            with torch.no_grad():
                taught = logits(teacher, seen, rollout.ids)[:, :size]
                reference = logits(teacher, p.context.student, rollout.ids)[:, :size]
            clip = {
                "low": loss.epsilon,
                "high": loss.epsilon if loss.epsilon_high is None else loss.epsilon_high,
                "old": None,
            }
            if case.old:
                clip["old"] = dense.log_p(student, ids).detach() + torch.tensor(moves(len(ids)))
            if case.method == "grpo":
                a = torch.tensor(advantage)
                if loss.credit:
                    a = dense.credited(student, taught, ids, a, loss.credit, loss.credit_clip)
                token_loss = dense.policy_gradient(student, ids, a, **clip)
                if loss.kl:
                    token_loss += loss.kl * dense.kl_to_reference(student, reference, ids)
                if loss.distil and (wrong or not switched):
                    own, its = student / loss.temperature, taught / loss.temperature
                    if loss.divergence == "sampled_token":
                        beside = dense.sampled_token(student, taught, ids, **clip)
                    else:
                        beside = dense.divergence(own, its, loss.divergence, loss.beta, None)
                    if loss.unsure:
                        log_p = its.log_softmax(-1)
                        unsure = -(log_p.exp() * log_p).sum(-1) > loss.unsure_entropy
                        forward = dense.divergence(own, its, "forward_kl", loss.beta, None)
                        beside = beside + loss.unsure * unsure * forward
                    for gate in loss.gates:
                        gap = dense.log_p(its, ids) - dense.log_p(own, ids).detach()
                        beside = (
                            gate.floor + (1 - gate.floor) * (gate.scale * gap).sigmoid()
                        ) * beside
                    token_loss = token_loss + loss.distil * beside
            elif loss.divergence == "sampled_token":
                token_loss = dense.sampled_token(student, taught, ids, **clip)
            else:
                token_loss = dense.divergence(
                    student / loss.temperature,
                    taught / loss.temperature,
                    loss.divergence,
                    loss.beta,
                    None if loss.clip == "none" else (loss.clip, loss.clip_threshold),
                )
            token_losses.append(token_loss)
            weights.append(weight_of(case, prompts, rollout, outcome))
    return dense.step(token_losses, weights, loss.aggregation, LONGEST)


def weight_of(case: Case, prompts: Prompts, rollout: Rollout, outcome) -> Tensor:
    """What each token counts, by the words of the config."""
    asked, weights = case.loss.get("weights", {}), torch.ones(len(rollout.ids))
    table = class_table(prompts.tokenizer)
    for n, token in enumerate(rollout.ids):
        weights[n] *= asked.get(CLASSES[table[token]], 1.0)
        first, last = asked.get("position", (1.0, 1.0))
        weights[n] *= first + (last - first) * n / max(1, len(rollout.ids) - 1)
        if n < asked.get("skip_first", 0):
            weights[n] = 0.0
    if outcome is not None:
        weights *= asked.get("correct" if outcome.correct else "incorrect", 1.0)
    return weights if rollout.finished else weights * asked.get("truncated", 1.0)


def gradient(loss: Tensor, model) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("case", "teacher"), PAIRS, ids=str)
def test_a_methods_gradient_is_its_dense_renderings(case, teacher, precision, make):
    config, model, scorer, objective, problems = make(case, teacher, precision)
    groups, _ = objective.sample_groups(problems)
    if case.old:
        groups = with_old(groups, model, moves)
    totals = Totals()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = objective.loss(model, groups, totals)
    ours = gradient(loss, model)
    wanted = rendered(case, config, model, scorer.float(), problems, objective_prompts(config))
    theirs = gradient(wanted, model)
    # bf16 keeps eight bits, and errors of four layers' products add up.
    tolerance = 1e-5 if precision == "fp32" else 16 * torch.finfo(torch.bfloat16).eps
    allowed = tolerance * theirs.norm()
    if precision == "bf16" and case.loss.get("clip") == "entry":
        # What rounding carries across the clip loses its gradient, in a dense rendering too.
        with torch.autocast("cpu", torch.bfloat16):
            dense_bf16 = rendered(case, config, model, scorer, problems, objective_prompts(config))
        allowed = 2 * (gradient(dense_bf16, model) - theirs).norm()
    assert theirs.norm() > 1e-3
    assert (ours - theirs).norm() <= allowed
    assert loss.item() == pytest.approx(wanted.item(), rel=tolerance, abs=tolerance)
    assert totals.tokens == sum(sample.counted for sample in samples_of(groups))


def objective_prompts(config) -> Prompts:
    return Prompts(config.prompts, tiny.make_tokenizer())


TRAINED = [
    Case("opsd", {"divergence": "sampled_token"}, old=True),
    Case("grpo", {"kl": 0.05}, teachers=("initial", "ema", "model"), old=True),
    Case("grpo", {"credit": 0.5}, old=True),
]
"""Beside what test_matrix trains."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("case", "teacher"), [(case, t) for case in TRAINED for t in case.teachers], ids=str
)
def test_the_loss_of_a_fixed_batch_falls(case, teacher, precision, make):
    _, model, _, objective, problems = make(case, teacher, precision)
    groups, _ = objective.sample_groups(problems)
    if case.old:
        groups = with_old(groups, model)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-4, fused=True), []
    for _ in range(5):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = objective.loss(model, groups, Totals())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02 * abs(losses[0])


def test_tokens_of_a_padded_head_have_the_class_other():
    """A head may have more rows than its tokenizer has tokens, and a rollout any of them."""
    table = class_table(tiny.make_tokenizer())
    beyond = torch.tensor([len(tiny.make_tokenizer()), 10_000])
    parts = split_by_class(table, beyond, torch.tensor([2.0, 3.0]))
    assert parts["other"].tolist() == [2.0, 3.0]
    assert all(not values.any() for name, values in parts.items() if name != "other")


def test_a_rollout_that_no_teacher_sees_has_its_policy_gradient_alone(make):
    """In a group whose other rollout distils: gradient and entropies against a dense rendering."""
    case = Case("grpo", {"distil": 0.7}, teachers=("initial",))
    _, model, teacher, objective, problems = make(case, "initial", "fp32")
    problems = [replace(p, teachers={"teacher": [None, p.context.teacher]}) for p in problems]
    groups, _ = objective.sample_groups(problems)
    totals = Totals()
    ours = gradient(objective.loss(model, groups, totals), model)
    losses, entropies = [], []
    for p in problems:
        advantages = group_advantages([outcome.reward for outcome in p.outcomes], True)
        for number, (rollout, advantage) in enumerate(zip(p.rollouts, advantages, strict=True)):
            ids = torch.tensor(rollout.ids)
            student = logits(model, p.context.student, rollout.ids)
            clip = {"low": 0.2, "high": 0.2, "old": None}
            loss = dense.policy_gradient(student, ids, torch.tensor(advantage), **clip)
            if number:
                with torch.no_grad():
                    taught = logits(teacher, p.context.teacher, rollout.ids)
                loss = loss + 0.7 * dense.divergence(student, taught, "forward_kl", 0.5, None)
            losses.append(loss)
            if number or advantage:  # what has neither runs in no pass
                log_p = student.detach().log_softmax(-1)
                entropies.append(-(log_p.exp() * log_p).sum(-1))
    weights = [torch.ones(len(loss)) for loss in losses]
    theirs = gradient(dense.step(losses, weights, "token", LONGEST), model)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    wanted = float(torch.cat(entropies).mean())
    assert totals.means()["student_entropy"] == pytest.approx(wanted, rel=1e-5)


def test_grpo_and_its_divergence_sweep_the_head_once(make, monkeypatch):
    """One sweep serves both, unless a gate needs the divergence's results first."""
    for asked, sweeps in (({}, 0), ({"gates": [{"gate": "gap"}]}, 1)):
        case = Case("grpo", {"distil": 0.7, **asked}, teachers=("initial",))
        _, model, _, objective, problems = make(case, "initial", "fp32")
        groups, _ = objective.sample_groups(problems)
        tokens = []
        found = linear_log_prob

        def counted(hidden, *its, found=found, tokens=tokens, **more):
            tokens.append(len(hidden))
            return found(hidden, *its, **more)

        monkeypatch.setattr("opsd.objectives.log_probs.linear_log_prob", counted)
        objective.loss(model, groups, Totals()).backward()
        monkeypatch.undo()
        assert sum(size > 0 for size in tokens) == sweeps

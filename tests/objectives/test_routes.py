"""teacher.routes and loss.sft_alpha: groups of several kinds in one micro-batch, against their
dense rendering; what is said of rows without a teacher."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import dense_rendering as dense
from helpers.lines import read_lines
from helpers.training_cases import (
    ROWS,
    changed,
    graded,
    load_student,
    logits,
    prompts_of,
    quiet,
    short_config,
)
from torch import nn
from transformers import AutoModelForCausalLM

from opsd.common.errors import UserError
from opsd.config.data import SourceSection
from opsd.config.loss import LossSection
from opsd.data.prompts import Prompts
from opsd.models.teacher import Member
from opsd.objectives import GRPO, OPSD, Distill, Problem, Totals
from opsd.rollout import Rollout
from opsd.training.failed_steps import read_failed_step
from opsd.training.load_data import fitting_data, load_data
from opsd.training.micro_batches import packed_batches
from opsd.training.run import train

ROLLOUTS = (([5, 6, 7, 8], [9, 4, 11]), ([8, 8],), ([3, 12, 5, 5, 6],), ([4], [7, 7, 9]))
NAMES = ("math", "code", "own", "math")


def problems_for(prompts, names=NAMES) -> list[Problem]:
    made = []
    for row, rollouts, name in zip(ROWS, ROLLOUTS, names, strict=False):
        row = replace(row, columns={**row.columns, "teacher": name})
        made.append(Problem(row, prompts.context(row), [Rollout(ids, True) for ids in rollouts]))
    return made


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def check(objective, model, groups, wanted):
    """The loss and its gradient are the wanted one's, in one micro-batch and in several."""
    theirs = gradient(wanted, model)
    for share, batches in (
        (True, [groups]),
        (False, [groups]),
        (True, packed_batches(groups, 60)),
    ):
        totals = Totals()
        loss = sum(objective.loss(model, batch, totals, share) for batch in batches)
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-5)
        assert (gradient(loss, model) - theirs).norm() <= 1e-5 * theirs.norm()
    assert len(batches) > 1
    return totals


def dense_tokens(model, problem, rollout, member, role, section):
    student = logits(model, problem.context.student, rollout.ids)
    with torch.no_grad():
        teacher = logits(member, problem.context.of(role), rollout.ids)[:, : student.shape[-1]]
    if section.divergence == "sampled_token":
        ids = torch.tensor(rollout.ids)
        return dense.sampled_token(student, teacher, ids, low=0.2, high=0.2)
    return dense.divergence(student, teacher, section.divergence, section.beta, None)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("kind", [OPSD, Distill])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "sampled_token"])
def test_several_teachers_in_one_micro_batch(divergence, kind, balance, files, wider):
    """One of another width and a padded vocabulary, one with a bias, and the student itself."""
    model, tokenizer = load_student(files)
    other, wide = changed(files, 3), AutoModelForCausalLM.from_pretrained(wider).eval()
    other.lm_head.bias = nn.Parameter(torch.randn(other.lm_head.weight.shape[0]))
    models = {"math": other, "code": wide, "own": model}
    members = [Member(made, "", route=n, column="teacher") for n, made in models.items()]
    section = LossSection(divergence=divergence, weights={"balance": balance})
    problems, role = problems_for(prompts_of(tokenizer)), kind.teacher_role
    objective = kind(section, other, mix=members)
    groups, measures = objective.sample_groups(problems)
    assert [group.route for group in groups] == list(NAMES)
    assert measures == {
        "teacher_math_tokens": pytest.approx(11 / 18),
        "teacher_code_tokens": pytest.approx(2 / 18),
        "teacher_own_tokens": pytest.approx(5 / 18),
    }
    sums, counts = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0)
    for p, name in zip(problems, NAMES, strict=True):
        for rollout in p.rollouts:
            each = dense_tokens(model, p, rollout, models[name], role, section)
            sums[name] = sums[name] + each.sum()
            counts[name] += len(rollout.ids)
    wanted = sum(sums.values()) / 18
    if balance:  # the mean over teachers of the mean over their tokens
        wanted = sum(sums[name] / counts[name] for name in models) / 3
    totals = check(objective, model, groups, wanted)
    means = totals.means()
    assert totals.tokens == totals.trained == 18
    if divergence != "sampled_token":
        whole = sum(total.item() for total in sums.values())
        assert means["divergence"] == pytest.approx(whole / 18, rel=1e-4, abs=1e-6)
        for name in models:
            wanted = sums[name].item() / counts[name]
            assert means[f"teacher_{name}_divergence"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_what_is_measured_of_all_tokens_is_measured_of_all_teachers(files):
    """One teacher's tokens are all clipped, the student's own are not."""
    model, tokenizer = load_student(files)
    models = {"math": changed(files, 3), "code": model, "own": model}
    members = [Member(made, "student", route=n, column="teacher") for n, made in models.items()]
    section = LossSection(clip="token", clip_threshold=1e-6)
    objective = OPSD(section, model, mix=members)
    groups, _ = objective.sample_groups(problems_for(prompts_of(tokenizer)))
    totals = Totals()
    objective.loss(model, groups, totals)
    assert totals.means()["clipped_fraction"] == pytest.approx(11 / 18)


def test_split_weights_run_a_live_teacher_in_each_micro_batch(files):
    """Otherwise a process with another teacher's rows alone would not gather its weights."""
    model, tokenizer = load_student(files)
    models = {"math": changed(files, 3), "code": changed(files, 4), "own": model}
    members = [Member(made, "", route=n, column="teacher") for n, made in models.items()]
    objective = OPSD(LossSection(), model, mix=members)
    groups, _ = objective.sample_groups(problems_for(prompts_of(tokenizer)))
    plain, forwards = [objective.loss(model, [group], Totals()).item() for group in groups], []
    next(model.parameters()).ds_id = 0  # as ZeRO 3 marks weights
    model.get_decoder().register_forward_pre_hook(lambda *_: forwards.append(1))
    for number, group in enumerate(groups, start=1):
        assert objective.loss(model, [group], Totals()).item() == pytest.approx(plain[number - 1])
        assert len(forwards) == 2 * number


def test_a_teacher_without_tokens_takes_no_share(files):
    tokenizer, other = load_student(files)[1], changed(files, 3)
    members = [Member(other, "", route=name, column="teacher") for name in ("math", "code", "own")]
    objective = OPSD(LossSection(), other, mix=members)
    groups, measures = objective.sample_groups(problems_for(prompts_of(tokenizer), ("math", "own")))
    assert measures.keys() == {"teacher_math_tokens", "teacher_own_tokens"}
    weights = [sum(s.weight * s.tokens for s in group.samples) for group in groups]
    assert weights == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("method", ["opsd", "distil", "grpo"])
def test_sft_alpha_adds_the_loss_of_the_rows_own_texts(method, files):
    model, tokenizer = load_student(files)
    other, prompts = changed(files, 3), prompts_of(tokenizer)
    problems = problems_for(prompts)
    section = LossSection(sft_alpha=0.7, distil=0.5 if method == "distil" else 0.0)
    rewards = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    if method == "opsd":
        objective = OPSD(section, other, prompts=prompts)
    else:
        objective, problems = GRPO(section, other, prompts=prompts), graded(problems, rewards)
    groups, _ = objective.sample_groups(problems)
    plain = type(objective)(section.model_copy(update={"sft_alpha": 0.0}), other, prompts=prompts)
    without, _ = plain.sample_groups(problems)
    assert [g.given for g in groups] == [False] * len(without) + [True] * len(problems)
    before = Totals()
    wanted = plain.loss(model, without, before)  # which other tests hold against theirs
    texts = []
    for p in problems:
        ids = prompts.target(p.row)
        assert ids and ids == groups[len(without) + len(texts)].samples[0].rollout
        texts.append(-dense.log_p(logits(model, p.context.student, ids), torch.tensor(ids)))
    text = torch.cat(texts).mean()
    totals = check(objective, model, groups, wanted + 0.7 * text)
    means = totals.means()
    assert means.pop("sft_negative_log_prob") == pytest.approx(text.item(), rel=1e-5)
    assert means == pytest.approx(before.means(), rel=1e-4, abs=1e-6)
    assert totals.tokens == before.tokens
    assert totals.trained == before.tokens + sum(map(len, texts))


def run_of(files, tmp_path, names, **sections):
    """A config whose rows name these teachers in turn."""
    lines = [{**row.columns, "teacher": names[n % len(names)]} for n, row in enumerate(ROWS)]
    for line in lines:
        if line["teacher"] is ...:
            del line["teacher"]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return short_config(files[0], tmp_path / "named.jsonl", tmp_path / "run", **sections)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a", "maths"], "is 'teacher': it is 'maths' in training row 2 .*routes .a, b"),
        (["a", 3], "it is 3 in training row 2"),
        (["a", "b", ...], "it is missing in training row 3"),
    ],
)
def test_a_row_without_a_teacher_is_named(names, said, files, tmp_path):
    routes = {"a": {"policy": "initial"}, "b": {"policy": "live"}}
    config = run_of(files, tmp_path, names, teacher={"routes": routes})
    with pytest.raises(UserError, match=said):
        load_data(config)


def test_a_teacher_of_another_vocabulary_is_named_before_weights_load(files, tmp_path):
    model = tmp_path / "other"
    shutil.copytree(files[0], model)
    (model / "model.safetensors").unlink()
    text = (model / "tokenizer.json").read_text()
    swapped = text.replace('"0": ', '"x": ').replace('"1": ', '"0": ').replace('"x": ', '"1": ')
    assert swapped != text
    (model / "tokenizer.json").write_text(swapped)
    routes = {"a": {"policy": "initial"}, "b": {"path": str(model)}}
    config = run_of(files, tmp_path, ["a", "b"], teacher={"routes": routes})
    with pytest.raises(UserError, match=r"teacher.path is '.*other': .* 2 tokens differ"):
        train(config, quiet())


def test_a_text_beside_that_does_not_fit_is_named(files, tmp_path):
    tokenizer = load_student(files)[1]
    prompts = {"teacher": "{{ problem }} {{ answer }}"}
    config = run_of(files, tmp_path, "a", prompts=prompts, loss={"sft_alpha": 0.1})
    shown = Prompts(config.prompts, tokenizer)
    long = replace(ROWS[2], solution="1" * 90)
    fitting_data(config, ROWS[:4], [], shown, 100, quiet())
    with pytest.raises(UserError, match=r"row 3 needs .* tokens with its answer, .* window is 100"):
        fitting_data(config, [*ROWS[:2], long, ROWS[3]], [], shown, 100, quiet())


def test_a_failed_steps_group_has_a_teacher_of_its_config(files, tmp_path):
    config = run_of(files, tmp_path, "a", teacher={"routes": {"a": {}}})
    sample = {"rollout": [4], "weight": 1.0}
    group = {"student": [1], "teachers": [[1]], "samples": [sample], "route": "b"}
    failed = {
        "config": config.model_dump(),
        "step": 1,
        "weights": {},
        "average": None,
        "images": False,
    }
    torch.save({**failed, "groups": [group]}, tmp_path / "failed-step-1.pt")
    with pytest.raises(UserError, match=r"groups.0.route is 'b'"):
        read_failed_step(tmp_path / "failed-step-1.pt")
    torch.save({**failed, "groups": [{**group, "route": "a"}]}, tmp_path / "failed-step-2.pt")
    assert read_failed_step(tmp_path / "failed-step-2.pt").groups[0].route == "a"


def test_a_source_may_name_the_teacher_of_its_rows(files, tmp_path):
    routes = {"routes": {"a": {}, "b": {}}}
    config = run_of(files, tmp_path, ["a", "b"], teacher=routes, eval={"problems": 0})
    named = {"source": config.data.source, "limit": 6}
    config.data.source = [SourceSection(**named), SourceSection(**named, teacher="b")]
    names = [row.columns["teacher"] for row in load_data(config)[0]]
    assert names == ["a", "b"] * 3 + ["b"] * 6


def test_a_teacher_without_rows_is_told(files, tmp_path):
    notes, routes = [], {"a": {}, "b": {}, "c": {}}
    config = run_of(files, tmp_path, ["a", "c"], teacher={"routes": routes})
    load_data(config, notes.append)
    assert notes == ["teacher.routes: no training row names b"]


@pytest.mark.parametrize("method", ["opsd", "distill"])
def test_a_run_with_several_teachers(method, files, wider, tmp_path):
    policies = ["initial", "ema"] if method == "distill" else ["initial", "live"]
    routes = {"a": {"policy": policies[0]}, "b": {"policy": policies[1]}, "c": {"path": str(wider)}}
    more = {"train": {"micro_batch_tokens": 200}, "loss": {"sft_alpha": 0.1}}
    config = run_of(files, tmp_path, "abc", method=method, teacher={"routes": routes}, **more)
    lines = read_lines(train(config, quiet()) / "metrics.jsonl")
    assert len(lines) == 4
    for line in lines:
        shares = [line.get(f"teacher_{name}_tokens", 0) for name in "abc"]
        assert sum(shares) == pytest.approx(1)
        for name, share in zip("abc", shares, strict=True):
            assert (line.get(f"teacher_{name}_divergence") is not None) == bool(share)
        assert line["sft_negative_log_prob"] > 0 and line["divergence"] >= 0
    assert lines[-1]["trained_tokens"] > lines[-1]["generated_tokens"]

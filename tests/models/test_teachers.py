"""Teachers: a moving average, another model, its vocabulary; distillation and given rollouts."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.lines import read_lines
from helpers.training_cases import ROWS, logits, quiet, short_config, write_model, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from opsd.cli.main import main
from opsd.config.load import save_config
from opsd.config.loss import LossSection
from opsd.config.sections import PromptsSection
from opsd.data.prompts import Context, Prompts
from opsd.models.load import load_model
from opsd.models.moving_average import FILE
from opsd.models.teacher import make_teacher
from opsd.objectives import Distill, Problem, Totals
from opsd.quickstart import tiny_model as tiny
from opsd.quickstart.worksheet import WorksheetGrader
from opsd.rollout import Rollout
from opsd.runs.directory import claim_directory
from opsd.training.run import run as run_training

pytestmark = pytest.mark.usefixtures("no_report")


def execute(config, **more):
    claim_directory(Path(config.output.dir), config, False)
    return resumed(config, **more)


def resumed(config, **more):
    model, tokenizer = load_model(config.model)
    torch.manual_seed(config.train.seed)
    rows, held_out = ROWS[:12], ROWS[12:]
    return run_training(
        config, model, tokenizer, rows, held_out, WorksheetGrader(), quiet(), **more
    )


def test_an_ema_teacher_averages_the_students_weights(files, tmp_path):
    decay, train = 0.75, {"steps": 3, "save_every": 1, "save_total_limit": 3}
    teacher = {"policy": "ema", "ema_decay": decay}
    config = short_config(*files, tmp_path / "run", teacher=teacher, train=train)
    execute(config)
    average = load_file(files[0] / "model.safetensors")
    for step in (1, 2, 3):
        after = load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        average = {n: decay * a + (1 - decay) * after[n] for n, a in average.items()}
        saved = load_file(tmp_path / "run" / f"checkpoint-{step}" / FILE)
        for name, value in saved.items():
            assert torch.allclose(value, average[name], rtol=0, atol=1e-6), (step, name)
    moved = load_file(tmp_path / "run" / "checkpoint-3" / FILE)
    first = load_file(files[0] / "model.safetensors")
    assert any(not torch.equal(moved[name], first[name]) for name in moved)


def test_an_ema_run_resumes_bit_for_bit(files, tmp_path):
    teacher = {"policy": "ema", "ema_decay": 0.5}
    whole = short_config(*files, tmp_path / "whole", teacher=teacher)
    execute(whole)
    again = short_config(*files, tmp_path / "again", teacher=teacher)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    resumed(again, checkpoint=tmp_path / "again" / "checkpoint-2")
    weights = [
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    losses = [
        [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "again")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_a_checkpoint_of_another_policy_is_refused(files, tmp_path):
    execute(short_config(*files, tmp_path / "run"))
    config = short_config(*files, tmp_path / "run", teacher={"policy": "ema"})
    with pytest.raises(Exception, match="holds no average"):
        resumed(config, checkpoint=tmp_path / "run" / "checkpoint-2")


def test_distill_is_the_divergence_to_the_other_models_distribution(files, wider):
    """Both see the student's context; the teacher's rows beyond the student's do not count."""
    model = AutoModelForCausalLM.from_pretrained(files[0], dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(wider, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(files[0])
    section = PromptsSection(student=tiny.STUDENT_PROMPT, teacher=tiny.TEACHER_PROMPT)
    prompts = Prompts(section, tokenizer)
    rollouts = [[5, 6, 7, 8], [9, 4]]
    problems = [
        Problem(row, prompts.context(row), [Rollout(ids, True)])
        for row, ids in zip(ROWS, rollouts, strict=False)
    ]
    objective = Distill(LossSection(), teacher)
    groups, _ = objective.sample_groups(problems)
    loss = objective.loss(model, groups, Totals())
    size, total = model.config.vocab_size, 0.0
    assert teacher.config.vocab_size > size
    for problem, ids in zip(problems, rollouts, strict=True):
        log_s = logits(model, problem.context.student, ids).log_softmax(-1)
        log_t = logits(teacher, problem.context.student, ids)[:, :size].log_softmax(-1)
        total = total + (log_t.exp() * (log_t - log_s)).sum()
    wanted = total / 6
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert wanted.item() > 0.01
    loss.backward()
    ours = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    wanted.backward()
    assert torch.allclose(ours, model.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("source", ["student", "teacher", "reference"])
def test_a_student_comes_closer_to_another_model(source, files, wider, tmp_path):
    config = short_config(
        *files,
        tmp_path / "run",
        method="distill",
        teacher={"policy": "model", "path": str(wider)},
        rollout={"source": source},
        train={"steps": 12, "save_every": 0, "learning_rate": 5e-3},
        eval={"every": 0, "samples": 1},
    )
    execute(config)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    divergence = [line["divergence"] for line in lines]
    assert sum(divergence[-3:]) < 0.9 * sum(divergence[:3])
    if source == "reference":
        assert lines[-1]["generated_tokens"] == 0 and lines[-1]["trained_tokens"] > 0
    else:
        assert lines[-1]["generated_tokens"] == lines[-1]["trained_tokens"] > 0
    assert read_lines(tmp_path / "run" / "samples.jsonl")[0]["tokens"]


def test_rollouts_of_the_teacher_are_the_teachers(files, wider, tmp_path, monkeypatch):
    """Greedy ones, after the context that the teacher sees."""
    seen = []
    original = Distill.sample_groups

    def spy(self, problems, step):
        seen.extend(problems)
        return original(self, problems, step)

    monkeypatch.setattr(Distill, "sample_groups", spy)
    config = short_config(
        *files,
        tmp_path / "run",
        method="distill",
        teacher={"policy": "model", "path": str(wider)},
        rollout={"source": "teacher", "top_k": 1},
        train={"steps": 1, "save_every": 0},
        eval={"problems": 0},
    )
    execute(config)
    teacher = AutoModelForCausalLM.from_pretrained(wider, dtype=torch.float32)
    for problem in seen:
        ids = problem.rollouts[0].ids
        best = logits(teacher, problem.context.student, ids)[:, : tiny.make_tokenizer().vocab_size]
        assert best.argmax(-1).tolist() == ids


def other_vocabulary(directory: Path) -> Path:
    write_model(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(directory)
    return directory


def test_a_teacher_of_another_vocabulary_is_one_line(files, tmp_path, capsys, monkeypatch):
    other = other_vocabulary(tmp_path / "other")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    config = short_config(
        other,
        files[1],
        tmp_path / "run",
        teacher={"policy": "model", "path": str(files[0])},
    )
    save_config(config, tmp_path / "config.yaml")
    assert main(["train", str(tmp_path / "config.yaml")]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "teacher.path" in message and "'<extra>'" in message and "vocabulary" in message


@pytest.mark.parametrize("command", [["--dry-run"], []])
def test_a_teacher_may_have_tokens_of_its_own(command, files, tmp_path, capsys):
    """A row whose text has one is an error; else they take no part."""
    other = str(other_vocabulary(tmp_path / "other"))
    teacher = {"policy": "model", "path": other}
    train = {"steps": 1, "save_every": 0}
    config = short_config(*files, tmp_path / "run", teacher=teacher, train=train)
    save_config(config, tmp_path / "config.yaml")
    said = [replace(ROWS[3], problem="1 <extra> 2", columns={**ROWS[3].columns})]
    said[0].columns["problem"] = "1 <extra> 2"
    bad = write_rows(tmp_path / "bad.jsonl", [*ROWS[:12], *said])
    arguments = ["train", str(tmp_path / "config.yaml"), *command]
    asked = [f"data.source={bad}", "eval.problems=0", f"output.dir={tmp_path / 'bad'}"]
    assert main([*arguments, *asked]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        "data.source: row 13 ('1 <extra> 2')" in message
        and "only the teacher's tokenizer has" in message
    )
    assert main(arguments) == 0


def test_a_teacher_with_fewer_rows_is_asked_about_ids_of_the_padding(files, wider, tmp_path):
    """The student draws ids of its padding; both are compared over the rows that both have."""
    config = short_config(
        wider, files[1], tmp_path / "run", teacher={"policy": "model", "path": str(files[0])}
    )
    student, tokenizer = load_model(config.model)
    teacher = make_teacher(
        config.teacher, config.model, torch.float32, student, tokenizer, student
    )[0]
    context, rollout = [5, 6, 7], [8, len(tokenizer) + 2, 9]
    groups, _ = Distill(LossSection(), teacher).sample_groups(
        [Problem(ROWS[0], Context(context, context), [Rollout(rollout, True)])]
    )
    loss = Distill(LossSection(), teacher).loss(student, groups, Totals())
    log_s = logits(student, context, rollout)[:, : len(tokenizer)].log_softmax(-1)
    log_t = logits(teacher, context, rollout).log_softmax(-1)
    wanted = (log_t.exp() * (log_t - log_s)).sum() / 3
    assert torch.isfinite(loss) and torch.allclose(loss, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["teacher.policy=model"], "teacher.path is missing"),
        (["teacher.path=somewhere"], "teacher.path is 'somewhere'"),
        (["method=distill"], "teacher.policy is 'initial': distill"),
        (["method=sft", "rollout.source=teacher"], "rollout.source is 'teacher'"),
        (["teacher.policy=ema", "teacher.ema_decay=1"], "teacher.ema_decay"),
        (["teacher.policy=model", "teacher.path=/nowhere"], "teacher.path is '/nowhere'"),
    ],
)
def test_settings_that_cannot_be_are_one_line(overrides, wanted, files, tmp_path, capsys):
    save_config(short_config(*files, tmp_path / "run"), tmp_path / "config.yaml")
    assert main(["train", str(tmp_path / "config.yaml"), *overrides]) == 1
    assert wanted in capsys.readouterr().err.splitlines()[-1]

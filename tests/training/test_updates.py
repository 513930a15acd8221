"""Several updates from one step's rollouts, other problems for those that say nothing, weights."""

import shutil
from itertools import pairwise

import pytest
import torch
from helpers.lines import read_lines
from helpers.training_cases import ROWS, logits, quiet, short_config, write_model, write_rows
from safetensors.torch import load_file

from opsd.config.load import save_config
from opsd.config.loss import LossSection
from opsd.objectives import GRPO, OPSD, TokenWeighting
from opsd.objectives.token_classes import CLASSES, class_of, class_table, classes_of
from opsd.quickstart import tiny_model as tiny
from opsd.rollout import Rollout
from opsd.training.run import train

pytestmark = pytest.mark.usefixtures("no_report")

VERIFIER = """
def grade(completion, row):
    return sum(character.isdigit() for character in completion) / 6
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    (directory / "mine.py").write_text(VERIFIER)
    return write_model(directory / "model"), write_rows(directory / "rows.jsonl")


def config_of(files, directory, method="grpo", **sections):
    reward = {"verifier": f"{files[0].parent / 'mine.py'}:grade", "success_threshold": 0.6}
    if method != "grpo":
        reward["log"] = True
    loss = {"reward": reward, **sections.pop("loss", {})}
    rollout = {"group_size": 4, **sections.pop("rollout", {})}
    train = {"steps": 2, "problems_per_step": 4, **sections.pop("train", {})}
    return short_config(
        *files, directory, method=method, loss=loss, rollout=rollout, train=train, **sections
    )


@pytest.mark.parametrize(("method", "kind"), [("grpo", GRPO), ("opsd", OPSD)])
def test_updates_of_a_step_know_the_weights_it_began_with(
    method, kind, files, tmp_path, monkeypatch
):
    """Two mini-batches, gone through twice: four updates, of which the first is on-policy."""
    seen, updates = [], []
    original = kind.loss

    def spy(self, model, groups, totals, share):
        seen.append((groups, next(model.parameters()).detach().clone()))
        if len(seen) == 1:
            for group, sample in ((g, s) for g in groups for s in g.samples):
                ids = torch.tensor(sample.rollout)
                own = logits(model, group.student, ids.tolist()).log_softmax(-1)
                own = own[torch.arange(len(ids)), ids]
                assert torch.allclose(own, torch.tensor(sample.old_log_probs), atol=1e-4)
        return original(self, model, groups, totals, share)

    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda *a, **k: (updates.append(1), step(*a, **k))[1]
    )
    monkeypatch.setattr(kind, "loss", spy)
    config = config_of(
        files,
        tmp_path / "run",
        method,
        train={"steps": 1, "mini_batches": 2, "inner_epochs": 2, "save_every": 0},
        eval={"problems": 0},
    )
    (line,) = read_lines(train(config, quiet()) / "metrics.jsonl")
    assert len(updates) == 4 and len(seen) == 4
    assert [s for s, _ in seen[:2]] == [s for s, _ in seen[2:]]  # the same old values, too
    weights = [parameter for _, parameter in seen]
    assert all(not torch.equal(a, b) for a, b in pairwise(weights))
    assert line["grad_norm"] > 0
    if method == "grpo":
        assert 0 <= line["ratio_clipped_fraction"] < 1
    else:
        assert line["importance_ratio"] != 1 and "engine_divergence" not in line


def test_one_update_needs_no_old_values(files, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "opsd.training.step.rollout_log_prob", lambda *_, **__: pytest.fail("was asked for")
    )
    config = config_of(files, tmp_path / "run", train={"steps": 1, "save_every": 0})
    train(config, quiet())


def test_mini_batches_are_the_step_where_the_optimizer_does_nothing(files, tmp_path):
    """At a rate of next to nothing the parts' losses add up to the whole step's."""
    losses = []
    for parts in (1, 2):
        config = config_of(
            files,
            tmp_path / str(parts),
            "opsd",
            loss={"aggregation": "constant"},
            train={"steps": 1, "mini_batches": parts, "learning_rate": 1e-12, "save_every": 0},
            eval={"problems": 0},
        )
        (line,) = read_lines(train(config, quiet()) / "metrics.jsonl")
        losses.append(line["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] > 0


def test_a_run_of_several_updates_resumes_bit_for_bit(files, tmp_path):
    sections = {"train": {"steps": 4, "mini_batches": 2, "inner_epochs": 2, "save_every": 2}}
    whole = config_of(files, tmp_path / "whole", rollout={"dynamic_sampling": 1}, **sections)
    train(whole, quiet())
    again = config_of(files, tmp_path / "again", rollout={"dynamic_sampling": 1}, **sections)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "again" / name)
    save_config(again, tmp_path / "again" / "config.yaml")
    train(again, quiet(), resume=True)
    weights = [
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    losses = [
        [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "again")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_other_problems_are_drawn_for_those_that_say_nothing(files, tmp_path):
    """Greedy rollouts are all alike, so that each round draws a whole step's problems again."""
    config = config_of(
        files,
        tmp_path / "run",
        rollout={"dynamic_sampling": 2, "top_k": 1},
        train={"steps": 1, "save_every": 0},
        eval={"problems": 0},
    )
    (line,) = read_lines(train(config, quiet()) / "metrics.jsonl")
    assert line["generated_tokens"] > 2 * 4 * 4 and line["loss"] == 0
    assert line["informative_groups"] == 0
    sampled = config_of(
        files,
        tmp_path / "other",
        rollout={"dynamic_sampling": 3},
        train={"steps": 1, "save_every": 0},
        eval={"problems": 0},
    )
    (line,) = read_lines(train(sampled, quiet()) / "metrics.jsonl")
    assert line["informative_groups"] == 1 and line["grad_norm"] > 0


def test_only_right_rollouts_are_learnt_from(files, tmp_path):
    config = config_of(
        files,
        tmp_path / "run",
        "opsd",
        loss={"weights": {"incorrect": 0.0}},
        train={"steps": 3, "save_every": 0},
        eval={"problems": 0},
    )
    lines = read_lines(train(config, quiet()) / "metrics.jsonl")
    for line in lines:
        assert line.get("trained_fraction", 1.0) == pytest.approx(line["correct_fraction"])
    assert any(0 < line["correct_fraction"] < 1 for line in lines)
    assert lines[-1]["trained_tokens"] < lines[-1]["generated_tokens"]


def test_token_classes():
    texts = {
        "12": "maths", "+": "maths", " =": "maths", "\\frac": "maths", "x_": "maths",
        " Wait": "style", "so": "style", "sonnet": "other", " the": "other", "\n": "other",
    }  # fmt: skip
    assert {text: class_of(text) for text in texts} == texts
    tokenizer = tiny.make_tokenizer()
    table = class_table(tokenizer)
    ids = torch.tensor([*tokenizer("7<|end|>S").input_ids, len(tokenizer), len(tokenizer) + 40])
    names = [CLASSES[place] for place in classes_of(table, ids)]
    assert names == ["maths", "special", "other", "other", "other"]  # the last two of a padded head
    weighed = TokenWeighting(LossSection(weights={"maths": 2.0, "special": 0.0}), 0, table)
    (weight,) = weighed([Rollout(ids.tolist(), True)], [None])
    assert weight.factors == (2.0, 0.0, 1.0, 1.0, 1.0) and weight.of_all == pytest.approx(1 / 5)


def test_the_divergence_is_logged_by_token_class(files, tmp_path):
    config = config_of(
        files,
        tmp_path / "run",
        "opsd",
        train={"steps": 1, "save_every": 0},
        eval={"problems": 0},
    )
    (line,) = read_lines(train(config, quiet()) / "metrics.jsonl")
    parts = [line[f"divergence_{name}"] for name in ("maths", "style", "special", "other")]
    assert sum(parts) == pytest.approx(line["divergence"], rel=1e-5)
    assert parts[0] > 0 and parts[2] > 0 and len(ROWS) > 4

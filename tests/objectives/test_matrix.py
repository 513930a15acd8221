"""Every method, by every teacher, of all weights or adapters, in fp32 or bf16, learns a batch."""

from pathlib import Path

import pytest
import torch
from helpers.training_cases import ROWS, graded, short_config, with_old

from opsd.common.precision import compute_dtype, weights_dtype
from opsd.data.prompts import Prompts
from opsd.models.load import load_model
from opsd.models.lora import add_adapters
from opsd.models.teacher import make_teacher
from opsd.objectives import Problem, Totals, make_objective
from opsd.rollout import Rollout, Sampling
from opsd.training.step import OPSDStep

ROLLOUTS = ([5, 6, 7, 8], [9, 4, 11], [8, 8], [3, 12, 5, 5, 6])
LORA = {"lora": {"rank": 4, "alpha": 16}}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize(
    ("method", "policy"),
    [
        ("opsd", "initial"),
        ("opsd", "live"),
        ("opsd", "ema"),
        ("opsd", "model"),
        ("distill", "model"),
        ("grpo", "none"),
        ("grpo", "initial"),
        ("grpo", "live"),
        ("grpo", "ema"),
        ("grpo", "model"),
        ("sft", "none"),
    ],
)
def test_the_loss_of_a_fixed_batch_falls(method, policy, adapters, precision, files, wider):
    own = {"policy": "initial" if policy == "none" else policy}
    teacher = {**own, **({"path": str(wider)} if policy == "model" else {})}
    # GRPO has a teacher for what it credits, or as the reference of a KL.
    asks = {"credit": 0.5} if policy == "live" else {"credit": 0.5, "kl": 0.01}
    config = short_config(
        *files,
        Path("unused"),
        method=method,
        teacher=teacher,
        loss=asks if method == "grpo" and policy != "none" else {},
        rollout={"group_size": 2},
        train={"precision": precision},
        model=LORA if adapters else {},
    )
    torch.manual_seed(0)
    model, tokenizer = load_model(
        config.model, dtype=weights_dtype(config.train.precision, config.model.lora is not None)
    )
    if adapters:
        model = add_adapters(model, config.model)
    made, average = make_teacher(
        config.teacher, config.model, compute_dtype(config.train.precision), model, tokenizer, model
    )
    prompts = Prompts(config.prompts, tokenizer)
    problems = [
        Problem(row, prompts.context(row), [Rollout(ids, True) for ids in pair])
        for row, pair in zip(ROWS, (ROLLOUTS[:2], ROLLOUTS[2:]), strict=False)
    ]
    scorer = model if policy == "live" else made
    objective = make_objective(method, config.loss, scorer, prompts, Sampling(6))
    groups, _ = objective.sample_groups(graded(problems, [1.0, 0.0, 0.0, 1.0]))
    if method == "grpo":  # or the surrogate's value is that of the advantages, whatever is learnt
        groups = with_old(groups, model)
    step = OPSDStep(model.train(), objective)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rate = 1e-2 if adapters else 1e-3
    trains = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trains, rate, weight_decay=0), []
    for _ in range(8):
        if average is not None:
            average.follow(model, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = step(groups, Totals())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1 * abs(losses[0]), losses
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name for name in moved) == adapters
    kind = {torch.float32} if not adapters or precision == "fp32" else {torch.bfloat16}
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == kind
    assert all(p.dtype == torch.float32 for p in trains)

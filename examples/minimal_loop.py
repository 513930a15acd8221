"""One whole OPSD run, without a trainer: what `opsd train` does, in the order in which it does it.

    python examples/minimal_loop.py examples/laptop.yaml train.steps=20

A model samples solutions to problems. Each solution is then read twice by the same model: as the
student, who has seen the problem alone, and as the teacher, who has been shown the worked solution
too. The loss is the divergence between what the two expect at each token. So the model learns, on
texts that it has written itself, what it would have said had it known the solution.

The file is a config as `opsd train` takes it. This loop reads the fields that it names, in fp32,
and leaves out what a long run needs: micro-batches, checkpoints, schedules, several GPUs.
"""

import sys
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import count

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from transformers import PreTrainedModel

from opsd import (
    Clip,
    GenerateSampler,
    Grader,
    OPSDConfig,
    Prompts,
    Row,
    Sampling,
    decode,
    head_arguments,
    linear_divergence,
    load_config,
    load_data,
    load_model,
    shared_prefix_hidden_states,
    stop_ids,
)


def train(config: OPSDConfig) -> list[float]:
    """Train and evaluate by `config`; returns each step's loss."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, held_out = load_data(config)
    model, tokenizer = load_model(config.model, device)
    teacher = deepcopy(model).requires_grad_(False)  # keeps the weights of step 0
    prompts = Prompts(config.prompts, tokenizer)
    sampler = GenerateSampler(model, stop_ids(model, tokenizer))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.train.learning_rate,
        betas=(config.train.beta1, config.train.beta2),
        weight_decay=config.train.weight_decay,
    )
    print(f"before: {accuracy(config, held_out, prompts, sampler):.1%} right")

    torch.manual_seed(config.train.seed)
    losses = []
    for number, batch in zip(range(config.train.steps), batches(config, rows), strict=False):
        groups = sample(config, batch, prompts, sampler)
        loss = divergence(config, batch, groups, prompts, model, teacher)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {number + 1}: loss {losses[-1]:.4f}")

    print(f"after: {accuracy(config, held_out, prompts, sampler):.1%} right")
    return losses


def batches(config: OPSDConfig, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The problems of each step, without end: each epoch goes through all in another order."""
    size, seed = config.train.problems_per_step, config.train.seed
    for epoch in count():
        order = RandomSampler(rows, generator=torch.Generator().manual_seed(seed + epoch))
        yield from DataLoader(rows, size, sampler=order, drop_last=True, collate_fn=list)  # type: ignore


def sample(
    config: OPSDConfig, rows: Sequence[Row], prompts: Prompts, sampler: GenerateSampler
) -> list[list[list[int]]]:
    """A group of solutions to each problem, as token ids: the student's, who sees no solution."""
    rollout, size = config.rollout, config.rollout.group_size
    sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    contexts = [prompts.ids(row, "student") for row in rows for _ in range(size)]
    solutions = [written.ids for written in sampler.sample(contexts, sampling)]
    return [solutions[start : start + size] for start in range(0, len(solutions), size)]


def divergence(
    config: OPSDConfig,
    rows: Sequence[Row],
    groups: list[list[list[int]]],
    prompts: Prompts,
    model: PreTrainedModel,
    teacher: PreTrainedModel,
) -> Tensor:
    """The mean divergence of the student's from the teacher's next-token distributions, over all
    tokens of the solutions."""
    # Score: the same tokens after either context. Each context runs once for its whole group.
    students, teachers = (
        [(prompts.ids(row, role), group) for row, group in zip(rows, groups, strict=True)]
        for role in ("student", "teacher")
    )
    student_hidden = shared_prefix_hidden_states(model, students)
    with torch.no_grad():
        teacher_hidden = shared_prefix_hidden_states(teacher, teachers)
    # Compare: over the whole vocabulary, without its logits ever in memory at once.
    loss = config.loss
    return linear_divergence(
        student_hidden,
        teacher_hidden,
        model.get_output_embeddings().weight,
        teacher.get_output_embeddings().weight,
        divergence=loss.divergence,
        beta=loss.beta,
        temperature=loss.temperature,
        clip=None if loss.clip == "none" else Clip(loss.clip, loss.clip_threshold),
        **head_arguments(model),
    ).loss


def accuracy(
    config: OPSDConfig, rows: Sequence[Row], prompts: Prompts, sampler: GenerateSampler
) -> float:
    """The share of held-out problems that the student's likeliest answer solves."""
    greedy = Sampling(config.rollout.max_new_tokens, temperature=0)
    rollouts = sampler.sample([prompts.ids(row, "student") for row in rows], greedy)
    with Grader() as grader:
        answers = decode(prompts.tokenizer, rollouts)
        grades = grader.grade(answers, [row.answer for row in rows])
    return sum(grade.correct for grade in grades) / max(len(grades), 1)


if __name__ == "__main__":
    train(load_config(sys.argv[1], sys.argv[2:]))

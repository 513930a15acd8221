"""Makes the texts that a run leaves to read: rollouts of training steps, and sample completions in
which each token has its divergence and the teacher's choices."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.models.head import head, head_arguments, logits_of
from opsd.objectives import Problem
from opsd.prefix import Ids, rollout_hidden_states
from opsd.rollout.base import decode
from opsd.training.held_out import Evaluation

TOP = 3  # how many of the teacher's likeliest tokens are shown
CHUNK = 256  # rollout tokens with dense logits in memory at once


def sample_records(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    prompts: Prompts,
    rows: Sequence[Row],
    evaluation: Evaluation,
    count: int,
    teacher_role: str = "teacher",
) -> Iterator[dict]:
    """The first `count` held-out completions as lines for samples.jsonl, without the step.

    `teacher_role`: the context that the teacher sees; "student" if it is another model.
    """
    for i in range(min(count, len(rows))):
        row, rollout = rows[i], evaluation.rollouts[i]
        seen, taught = prompts.ids(row, "student"), prompts.ids(row, teacher_role)
        yield {
            **row.texts,
            "completion": evaluation.completions[i],
            "correct": evaluation.grades[i].correct,
            "sampling": {**evaluation.sampling, "seed": rollout.seed},
            "tokens": token_records(student, teacher, seen, taught, rollout.ids, prompts.tokenizer),
        }


def rollout_records(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    sampling: dict[str, Any],
    count: int,
) -> Iterator[dict]:
    """The first `count` rollouts of a step as lines for rollouts.jsonl, without the step.

    `sampling`: the settings of all rollouts. Each line adds the rollout's own seed, if it has one.
    """
    each = ((p, i) for p in problems for i in range(len(p.rollouts)))
    for problem, i in islice(each, count):
        rollout = problem.rollouts[i]
        line = {
            "problem": problem.row.problem,
            "completion": decode(tokenizer, [rollout])[0],
            "length": len(rollout.ids),
            "finished": rollout.finished,
            "sampling": {**sampling, "seed": rollout.seed},
        }
        if rollout.weights_of is not None:
            line["weights_of"] = rollout.weights_of
        if problem.outcomes is not None:
            outcome = problem.outcomes[i]
            line |= {"reward": outcome.reward, "correct": outcome.correct}
            line |= {"feedback": outcome.feedback} if outcome.feedback else {}
        yield line


@torch.no_grad()
def token_records(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    student_context: Ids,
    teacher_context: Ids,
    rollout: Ids,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict]:
    """Each rollout token: its text, KL(T‖S), the student's probability, the teacher's top three."""
    student_states = rollout_hidden_states(student, [(student_context, [rollout])])
    teacher_states = rollout_hidden_states(teacher, [(teacher_context, [rollout])])
    size = min(len(head(student)[0]), len(head(teacher)[0]))  # heads may be padded differently
    records = []
    for start in range(0, len(rollout), CHUNK):
        ids = rollout[start : start + CHUNK]
        whole = _log_probs(student, student_states[start : start + CHUNK], None)
        log_s = whole[:, :size].log_softmax(-1)
        log_t = _log_probs(teacher, teacher_states[start : start + CHUNK], size)
        divergence = torch.nn.functional.kl_div(log_s, log_t, reduction="none", log_target=True)
        own = whole.gather(1, torch.tensor(ids, device=log_s.device)[:, None]).exp()[:, 0]
        best = log_t.topk(TOP)
        for n, token in enumerate(ids):
            preferred = zip(best.indices[n].tolist(), best.values[n].exp().tolist(), strict=True)
            top = [[tokenizer.decode([t]), p] for t, p in preferred]
            text, far, sure = tokenizer.decode([token]), divergence[n].sum().item(), own[n].item()
            records.append(
                {"text": text, "divergence": far, "student_probability": sure, "teacher": top}
            )
    return records


def _log_probs(model: PreTrainedModel, hidden: Tensor, size: int | None) -> Tensor:
    weight, bias = (None if t is None else t[:size] for t in head(model))
    return logits_of(hidden, weight, bias, **head_arguments(model)).log_softmax(-1)

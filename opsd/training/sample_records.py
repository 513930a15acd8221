"""What readers see of a run's texts: sample completions, each token with its divergence and the
teacher's choices, and rollouts of training steps."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.models.head import head, head_arguments
from opsd.objectives import Problem
from opsd.prefix.rollout_states import Scored, rollout_hidden_states
from opsd.rollout.base import decode
from opsd.training.held_out import Evaluation

TOP = 3  # teacher's preferences shown a token
CHUNK = 256  # rollout tokens whose dense logits are held at once


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

    `teacher_role`: the context that the teacher sees; "student" where it is another model.
    """
    for i in range(min(count, len(rows))):
        row, rollout = rows[i], evaluation.rollouts[i]
        yield {
            "problem": row.problem,
            "solution": row.solution,
            "answer": row.answer,
            "completion": evaluation.completions[i],
            "correct": evaluation.grades[i].correct,
            "sampling": {**evaluation.sampling, "seed": rollout.seed},
            "tokens": token_records(
                student,
                teacher,
                Scored(prompts.ids(row, "student"), rollout.ids),
                Scored(prompts.ids(row, teacher_role), rollout.ids),
                prompts.tokenizer,
            ),
        }


def rollout_records(
    problems: Sequence[Problem],
    tokenizer: PreTrainedTokenizerBase,
    sampling: dict[str, Any],
    count: int,
) -> Iterator[dict]:
    """The first `count` rollouts of a step's problems as lines for rollouts.jsonl, without step.

    `sampling`: how all of them were drawn; each adds its seed, where it has one of its own.
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
        if problem.outcomes is not None:
            outcome = problem.outcomes[i]
            line |= {"reward": outcome.reward, "correct": outcome.correct}
            line |= {"feedback": outcome.feedback} if outcome.feedback else {}
        yield line


@torch.no_grad()
def token_records(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    as_student: Scored,
    as_teacher: Scored,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict]:
    """Each rollout token: its text, KL(T‖S), the student's probability, the teacher's top three."""
    student_states = rollout_hidden_states(student, [as_student])
    teacher_states = rollout_hidden_states(teacher, [as_teacher])
    size = min(len(head(student)[0]), len(head(teacher)[0]))  # padded differently
    records = []
    for start in range(0, len(as_student.rollout), CHUNK):
        ids = as_student.rollout[start : start + CHUNK]
        log_s = _log_probs(student, student_states[start : start + CHUNK], size)
        log_t = _log_probs(teacher, teacher_states[start : start + CHUNK], size)
        divergence = torch.nn.functional.kl_div(log_s, log_t, reduction="none", log_target=True)
        own = log_s.gather(1, torch.tensor(ids, device=log_s.device)[:, None]).exp()[:, 0]
        best = log_t.topk(TOP)
        for n, token in enumerate(ids):
            preferred = zip(best.indices[n].tolist(), best.values[n].exp().tolist(), strict=True)
            records.append(
                {
                    "text": tokenizer.decode([token]),
                    "divergence": divergence[n].sum().item(),
                    "student_probability": own[n].item(),
                    "teacher": [[tokenizer.decode([t]), p] for t, p in preferred],
                }
            )
    return records


def _log_probs(model: PreTrainedModel, hidden: Tensor, size: int) -> Tensor:
    weight, bias = head(model)
    logits = hidden.float() @ weight[:size].float().T
    if bias is not None:
        logits += bias[:size].float()
    options = head_arguments(model)
    logits *= options["logit_scale"]
    if cap := options["logit_softcap"]:
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1)

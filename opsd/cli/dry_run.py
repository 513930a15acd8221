"""`opsd train --dry-run`: everything that is checked before the weights are loaded, and a plan.

Nothing is trained, sampled or written. The model's tokenizer is loaded, its weights are not; a vLLM
server is not asked. A verifier's file is read, and not run.
"""

import os
from collections.abc import Sequence
from statistics import median

import torch

from opsd.cli.plan import Plan
from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.config.config import Config
from opsd.config.requirements import is_graded, longest_rollout, trained_roles, uses_teacher_prompt
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.grading.rewards import GradedRollout, check_code
from opsd.models.load import check_directory, load_tokenizer, window
from opsd.models.teacher import check_teacher
from opsd.plan.architectures import architecture
from opsd.plan.memory import Planner
from opsd.plan.workload import Lengths
from opsd.rollout import check_engine
from opsd.training.load_data import fitting_data, load_data
from opsd.training.preflight import check_launcher, check_machine

SHOWN = 400  # characters of a context


def dry_run(config: Config, display: Display) -> None:
    """Checks config, machine, data, prompts and tokenizers; shows what a run would do.

    Raises UserError for whatever `opsd train` would refuse before it loads weights.
    """
    check_launcher(config.train.sharding, config.rollout.engine)
    check_machine(config, makes=False)
    check_engine(config.rollout.engine)
    check_code(config.loss, is_graded(config), run=False)
    rows, held_out = load_data(config, display.note)
    check_directory(config.model)
    student = architecture(config.model)
    tokenizer = load_tokenizer(config.model)
    tokenizer.teachers_tokens = check_teacher(config.teacher, config.model, tokenizer)
    tokenizer.embedding_rows = student.get_text_config().vocab_size
    prompts = Prompts(config.prompts, tokenizer)
    limit = window(student)
    rows, held_out = fitting_data(config, rows, held_out, prompts, limit, display)
    lengths = _show_contexts(rows, prompts, config, limit, display)
    _show_examples(rows[0], prompts, config, display)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else None
    Plan(config, Planner(student, lengths, memory, processes)).show(display)
    display.note(
        f"{config.method}: {config.train.steps} steps of {config.train.problems_per_step} problems "
        f"from {len(rows)} rows, {len(held_out)} held out. Nothing was trained."
    )


def _show_contexts(
    rows: Sequence[Row], prompts: Prompts, config: Config, limit: int | None, display: Display
) -> Lengths:
    """Shows how long the contexts are; returns the median lengths, for the plan."""
    answer = longest_rollout(config)
    if answer is None:
        answer = max(
            length
            for role in trained_roles(config)
            for length in prompts.lengths(rows, f"{role} target")
        )
    table, middle = [], {}
    for role in trained_roles(config):
        tokens = sorted(prompts.lengths(rows, role))
        middle[role] = int(median(tokens))
        table.append((role, f"{tokens[0]:,}", f"{middle[role]:,}", f"{tokens[-1]:,}"))
    where = "no limit" if limit is None else f"window: {limit:,}"
    columns = ["context", "shortest", "median", "longest"]
    display.table(f"Tokens of contexts (answers: up to {answer:,}; {where})", columns, table)
    first = middle.get("student", middle.get("teacher"))
    beside = max(0, middle.get("teacher", first) - first)
    if prompts.over_rollouts:
        beside = answer  # such as a peer's rollout
    if config.method == "sft":
        beside = max(beside, answer)  # the target, which is what is learnt from
    return Lengths(first, beside, answer)


def _show_examples(row: Row, prompts: Prompts, config: Config, display: Display) -> None:
    contexts = {role: prompts.ids(row, role) for role in trained_roles(config)}
    if uses_teacher_prompt(config) and "teacher" in prompts.over_rollouts:
        wrong = GradedRollout("(a rollout)", True, 0.0, False, "(feedback)")
        right = GradedRollout("(a peer's rollout)", True, 1.0, True)
        context = prompts.teacher_of(row, wrong, [right])
        if context is None:
            raise UserError(
                "prompts.teacher is empty for a wrong rollout with feedback and a right peer: "
                "there would never be anything to teach"
            )
        contexts["teacher"] = context
    for role, ids in contexts.items():
        text = prompts.tokenizer.decode(ids)
        if len(text) > SHOWN:
            text = f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
        display.note(f"The {role}'s context of the first row:\n{text}\n")

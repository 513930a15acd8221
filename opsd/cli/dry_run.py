"""`opsd train --dry-run`: makes every check that needs no weights, and shows the run's plan.

It trains, samples and writes nothing. It loads the model's tokenizer but not its weights, does not
contact a vLLM server, and reads a verifier's file without running it.
"""

import os
from collections.abc import Sequence
from statistics import median
from textwrap import shorten

import torch

from opsd.cli.plan import Plan
from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.format import size
from opsd.config import requirements
from opsd.config.config import Config
from opsd.config.requirements import trained_roles
from opsd.data.prompts import Prompts
from opsd.data.rows import Row
from opsd.grading.grader import Grader
from opsd.grading.rewards import GradedRollout, check_code
from opsd.models.load import check_directory, load_tokenizer, window
from opsd.plan.architectures import architecture
from opsd.plan.gpus import GPU
from opsd.plan.memory import Planner
from opsd.plan.workload import Lengths
from opsd.rollout import check_engine
from opsd.training.load_data import fitting_data, load_data, make_prompts
from opsd.training.preflight import check_launcher, check_machine

SHOWN, GRADED = 5, 100  # show the answers of 5 rows, grade the solutions of 100


def dry_run(config: Config, display: Display, machine: tuple[GPU, int] | None = None) -> None:
    """Checks config, machine, data, prompts and tokenizers; shows what a run would do.

    machine: a GPU and how many of them; the plan is for that machine instead of this one.

    Raises UserError for whatever `opsd train` would refuse before it loads weights, and if the run
    does not fit into the memory of `machine`.
    """
    environment = os.environ if machine is None else {"WORLD_SIZE": str(machine[1])}
    check_launcher(config.train.sharding, config.rollout.engine, environment)
    if machine is None:
        check_machine(config, makes=False)
        check_engine(config.rollout.engine)
    check_code(config.loss, requirements.is_graded(config), run=False)
    rows, held_out = load_data(config, display.note)
    check_directory(config.model)
    student = architecture(config.model)
    tokenizer = load_tokenizer(config.model)
    tokenizer.embedding_rows = student.get_text_config().vocab_size
    prompts = make_prompts(config, student, tokenizer)
    limit = window(student)
    rows, held_out = fitting_data(config, rows, held_out, prompts, limit, display)
    lengths = _show_contexts(rows, prompts, config, limit, display)
    _show_examples(rows[0], prompts, config, display)
    if requirements.compares_answers(config):
        _show_answers(rows, config, display)
    memory = None if machine is None else int(machine[0].memory)
    if machine is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    processes = int(environment.get("WORLD_SIZE", "1"))
    plan = Plan(config, Planner(student, lengths, memory, processes))
    plan.show(display)
    train, kept = config.train, "only on Ctrl-C or SIGTERM (train.save_every)"
    kept = f"every {train.save_every} steps and at the end" if train.save_every else kept
    display.note(
        f"{config.method}: {train.steps} steps of {train.problems_per_step} problems from "
        f"{len(rows)} rows, {len(held_out)} held out. Nothing was trained. Checkpoints: {kept}."
    )
    if machine is not None:
        where, peak = f"{processes} x {machine[0].name}", size(plan.memory.peak)
        if plan.memory.peak > memory:
            mend = (
                f"`opsd plan` with --gpu {machine[0].name} --gpus {processes} says what to change"
            )
            raise UserError(f"--for: on {where} it takes {peak} of {size(memory)} each; {mend}")
        display.note(f"It fits on {where}: {peak} of {size(memory)} each.")


def _show_contexts(
    rows: Sequence[Row], prompts: Prompts, config: Config, limit: int | None, display: Display
) -> Lengths:
    """Shows the contexts' lengths in tokens; returns the medians, which the plan needs."""
    answer = requirements.longest_rollout(config)
    if answer is None:
        targets = [f"{role} target" for role in trained_roles(config)]
        answer = max(max(prompts.lengths(rows, target)) for target in targets)
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
        beside = max(beside, answer)  # the target, which sft trains on
    return Lengths(first, beside, answer)


def _show_examples(row: Row, prompts: Prompts, config: Config, display: Display) -> None:
    contexts = {role: prompts.ids(row, role) for role in trained_roles(config)}
    taught = requirements.uses_teacher_prompt(config)
    if taught and "teacher" in prompts.over_rollouts:
        wrong = GradedRollout("(a rollout)", True, 0.0, False, "(feedback)")
        right = GradedRollout("(a peer's rollout)", True, 1.0, True)
        shown = prompts.solved(row, "(the majority's answer)") if prompts.unsolved(row) else row
        context = prompts.teacher_of(shown, wrong, [right])
        if context is None:
            raise UserError("prompts.teacher is empty for a wrong rollout: nothing would be taught")
        contexts["teacher"] = context
    texts = (
        f"The {role}'s context of the first row ({len(ids):,} tokens):\n"
        f"{prompts.tokenizer.decode(ids)}\n"
        for role, ids in contexts.items()
    )
    display.note("\n".join(texts))


def _show_answers(rows: Sequence[Row], config: Config, display: Display) -> None:
    """Shows the rows' answers, and whether the rows' own solutions would be graded right."""
    some = [row for row in rows if not row.held][:GRADED]
    with Grader(strict=config.loss.reward.strict) as grader:
        grades = grader.grade([row.solution for row in some], [row.answer for row in some])
    table = [
        (
            str(number),
            shorten(row.answer, 30, placeholder=" …"),
            "-" if grade.extracted is None else shorten(grade.extracted, 30, placeholder=" …"),
            "right" if grade.correct else shorten(grade.reason, 60, placeholder=" …"),
        )
        for number, (row, grade) in enumerate(zip(some, grades, strict=True), start=1)
    ]
    columns = ["row", "answer", "in the solution", "the solution as a rollout would be"]
    display.table("Answers, and how the solutions are graded", columns, table[:SHOWN])
    right = sum(grade.correct for grade in grades)
    display.note(
        f"{right} of the first {len(some)} solutions would be graded right: it takes a final "
        "\\boxed{}." + ("" if config.method == "sft" else " Only method sft learns to write so.")
    )

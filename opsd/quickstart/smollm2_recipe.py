"""`opsd quickstart`: SmolLM2-135M-Instruct learns short sums from somebody else's solutions.

Pretrained model → cold start by SFT, in both roles' prompts and the model's own style → the
methods, on new problems whose solutions are in words.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from opsd.common.display import Display
from opsd.config.config import Config
from opsd.config.load import save_config
from opsd.config.sections import ModelSection
from opsd.data.rows import Row
from opsd.grading.grader import Grader
from opsd.models.copies import copy_model
from opsd.models.load import load_model
from opsd.quickstart.chain_sum import (
    STUDENT_TEMPLATE,
    TEACHER_SEED,
    TEACHER_TEMPLATE,
    make_chain_sum,
    make_rows,
    own_style,
)
from opsd.quickstart.download import smollm2_gguf
from opsd.quickstart.recipe import Base, Recipe, merge, repeated
from opsd.training.run import run

COLD_STEPS = 14
COLD_ROWS = 16  # a step; each in both roles
TRAIN_ROWS = 800
# Enough for what is near 0 (the pretrained model, in this form) and near 1 (the teacher).
FEW_PROBLEMS = 100
TEACHER_STEPS = 60  # of SFT in its own style, that make distill's teacher of the base

SECTIONS: dict[str, Any] = {
    # At some hundred tokens a sequence torch's fused CPU attention trains 25 % slower.
    "model": {"attention": "eager"},
    # No system message: SmolLM2's own would be a quarter of the student's tokens.
    "prompts": {"student": STUDENT_TEMPLATE, "teacher": TEACHER_TEMPLATE, "system": ""},
    # 48: forty would cut the longest answers with four terms.
    "rollout": {"group_size": 2, "max_new_tokens": 48, "batch_size": 32},
    "loss": {"memory_budget": 64 * 2**20},
    "train": {
        "problems_per_step": 16,
        "schedule": "linear",
        "warmup_steps": 5,
        "beta2": 0.99,
        "micro_batch_tokens": 320,
        "token_budget": 39_000,
    },
    "eval": {"batch_size": 50, "every": 13, "samples": 4},
}
METHODS: dict[str, dict[str, Any]] = {
    # The token clip keeps the teacher's corrections of a slip (1 to 2 nats) and tames what follows
    # it (up to 15 nats), where the teacher goes on from the solution's numbers instead.
    "opsd": {
        "loss": {"clip": "token", "clip_threshold": 0.3},
        "train": {"steps": 26, "learning_rate": 5e-5},
    },
    "grpo": {
        "rollout": {"group_size": 4},
        "train": {"steps": 26, "learning_rate": 1e-5, "problems_per_step": 8},
    },
    # As many trained tokens as the others generate: about 28 000.
    "sft": {"train": {"steps": 25, "learning_rate": 5e-4, "problems_per_step": 32}},
    "distill": {"train": {"steps": 26, "learning_rate": 5e-5}},
}


def smollm2_recipe(
    seed: int,
    problems: int | None = None,
    model_path: str | None = None,
    cold_steps: int = COLD_STEPS,
    solutions: int | None = None,
    solution_style: str = "words",
) -> Recipe:
    """The recipe.

    Args:
        problems: held-out problems, 300 unless told.
        model_path: another chat model's directory or hub name instead of SmolLM2.
        cold_steps: of SFT in both prompts, before the methods start.
        solutions: how many worked solutions there are to learn from; none: 800, of which no method
            needs all.
        solution_style: how they are written, one of SOLUTION_STYLES.
    """
    task = make_chain_sum(
        seed,
        cold_start=cold_steps * COLD_ROWS,
        train=TRAIN_ROWS,
        held_out=problems or 300,
        solution_style=solution_style,
    )

    def make_base(directory: Path, held_out, display: Display) -> Base:
        section = _smollm2(display) if model_path is None else ModelSection(path=model_path)
        section = section.model_copy(update=SECTIONS["model"])
        with display.stage("Load the pretrained model"):
            model, tokenizer = load_model(section)
        decoder = copy_model(model, torch.bfloat16)
        first = held_out(tokenizer).first(FEW_PROBLEMS)
        pretrained = first.evaluate(decoder, display, "student", "pretrained model")
        del decoder
        roles = {"loss": {"roles": ["student", "teacher"]}}
        cold = _own_style_config(section, directory / "cold_start", seed, cold_steps, roles)
        rows = [_in_own_style(example.row) for example in task.cold_start]
        _learn(cold, model, tokenizer, rows, grader, display, save=False)
        return Base(model, tokenizer, pretrained)

    def make_teacher(base: Path, display: Display) -> Path:
        place = base / "teacher"
        if (place / "summary.json").is_file():  # of an interrupted quickstart
            return place / "model"
        start = ModelSection(path=str(base / "model"))
        roles = {"loss": {"roles": ["student"]}}
        config = _own_style_config(start, place, seed, TEACHER_STEPS, roles)
        model, tokenizer = load_model(start.model_copy(update=SECTIONS["model"]))
        avoid = {row.problem for row in task.held_out}
        rows = make_rows(TEACHER_SEED + seed, TEACHER_STEPS * COLD_ROWS, avoid=avoid)
        _learn(config, model, tokenizer, [_in_own_style(row) for row in rows], grader, display)
        return place / "model"

    grader = Grader()
    return Recipe(
        name=model_path or "SmolLM2-135M-Instruct",
        train_rows=repeated(task.train, solutions),
        held_out_rows=task.held_out,
        grader=grader,
        make_base=make_base,
        sections=SECTIONS,
        methods=METHODS,
        make_teacher=make_teacher,
        teacher_problems=FEW_PROBLEMS,
    )


def _smollm2(display: Display) -> ModelSection:
    file = smollm2_gguf(display)
    return ModelSection(path=str(file.parent), gguf_file=file.name)


def _learn(config: Config, model, tokenizer, rows: list[Row], grader, display, save=True) -> None:
    directory = Path(config.output.dir)
    shutil.rmtree(directory, ignore_errors=True)  # what an interrupted quickstart has left
    directory.mkdir()
    save_config(config, directory / "config.yaml")
    run(config, model, tokenizer, rows, [], grader, display, save=save)


def _own_style_config(
    model: ModelSection, directory: Path, seed: int, steps: int, roles: dict
) -> Config:
    own = {
        "method": "sft",
        "model": model.model_dump(),
        "data": {"source": "reasoning_gym:chain_sum"},
        "prompts": {"target": "{{ own_style }}"},
        "train": {
            "steps": steps,
            "problems_per_step": COLD_ROWS,
            "learning_rate": 1e-4,
            "warmup_steps": min(3, steps),
            "seed": seed,
        },
        "eval": {"problems": 0},
        "output": {"dir": str(directory)},
    }
    return Config.model_validate(merge(SECTIONS, merge(own, roles)))


def _in_own_style(row: Row) -> Row:
    columns = {**row.columns, "own_style": own_style(row.columns["expression"])}
    return Row(row.problem, row.solution, row.answer, columns)

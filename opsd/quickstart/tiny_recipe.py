"""`opsd quickstart --tiny`: worksheets, a 0.8M-parameter base trained here, three methods."""

from pathlib import Path
from typing import Any

from opsd.common.display import Display
from opsd.quickstart import tiny_model as tiny
from opsd.quickstart.recipe import Base, Recipe, repeated
from opsd.quickstart.worksheet import WorksheetGrader, right_share, worksheet_rows

TRAIN_ROWS = 8000
"""More than any method needs."""

HELD_OUT_SEED = 10_000
"""The held-out worksheets are the same for every seed, so that runs can be compared."""

SECTIONS: dict[str, Any] = {
    "prompts": {"student": tiny.STUDENT_PROMPT, "teacher": tiny.TEACHER_PROMPT},
    "rollout": {"group_size": 1, "max_new_tokens": 44, "batch_size": 128},
    "train": {
        "problems_per_step": 64,
        "warmup_steps": 5,
        "precision": "fp32",
        "micro_batch_tokens": 8192,
        "token_budget": 200_000,
    },
    "eval": {"batch_size": 400, "every": 25, "samples": 4},
}
METHODS: dict[str, dict[str, Any]] = {
    "opsd": {"train": {"steps": 100, "learning_rate": 2e-3}},
    "grpo": {
        "rollout": {"group_size": 8},
        "train": {"steps": 100, "learning_rate": 1e-4, "problems_per_step": 8},
    },
    "sft": {"train": {"steps": 100, "learning_rate": 3e-3}},
    "distill": {"train": {"steps": 100, "learning_rate": 1e-3}},
}
TEACHER = tiny.BaseTraining(steps=1500, teacher_share=0.0)
"""How distill's teacher is trained: on problems alone, and three times as long as the base."""


def tiny_recipe(seed: int, problems: int | None = None, solutions: int | None = None) -> Recipe:
    """The recipe.

    Args:
        problems: held-out worksheets, 400 unless told.
        solutions: how many worked worksheets there are to learn from; none: TRAIN_ROWS.
    """

    def make_base(directory: Path, held_out, display: Display) -> Base:
        with display.stage("Train the base from scratch", total=tiny.BaseTraining().steps) as stage:
            path = tiny.cached_base(
                seed, progress=lambda step, loss: stage.update(completed=step, loss=loss)
            )
        return Base(*tiny.load_base(path))

    def make_teacher(base: Path, display: Display) -> Path:
        with display.stage("Train distill's teacher", total=TEACHER.steps) as stage:
            path = tiny.cached_base(
                seed, TEACHER, progress=lambda step, loss: stage.update(completed=step, loss=loss)
            )
        return path

    return Recipe(
        name="tiny Qwen3 (0.8M parameters)",
        train_rows=repeated(worksheet_rows(TRAIN_ROWS, seed=seed), solutions),
        held_out_rows=worksheet_rows(problems or 400, seed=HELD_OUT_SEED, held_out=True),
        grader=WorksheetGrader(),
        make_base=make_base,
        sections=SECTIONS,
        methods=METHODS,
        make_teacher=make_teacher,
        reward=right_share,
    )

"""The recipe of `opsd quickstart --tiny`: worksheets, and a base of 0.8M parameters made here."""

from pathlib import Path

from opsd.common.display import Display
from opsd.grading.reward_functions import by_row
from opsd.quickstart import tiny_model as tiny
from opsd.quickstart.recipe import Base, Recipe
from opsd.quickstart.settings import Asked, settings
from opsd.quickstart.worksheet import WorksheetGrader, right_share, worksheet_rows

TRAIN_ROWS = 8000
"""Number of training rows: more than any method needs."""

HELD_OUT_SEED = 10_000
"""The seed of the held-out worksheets: the same for every run, so that runs can be compared."""

SECTIONS, METHODS = settings("tiny")
TEACHER = tiny.BaseTraining(steps=1500, teacher_share=0.0)
"""How to train distill's teacher: without solutions, and for three times as long as the base."""


def tiny_recipe(asked: Asked) -> Recipe:
    """The recipe for these arguments; a solution is a worked worksheet."""

    def train(title: str, training: tiny.BaseTraining, display: Display) -> Path:
        with display.stage(title, total=training.steps) as stage:
            return tiny.cached_base(
                asked.seed,
                training,
                progress=lambda step, loss: stage.update(completed=step, loss=loss),
            )

    def make_base(directory: Path, held_out, display: Display) -> Base:
        path = train("Train the base from scratch", tiny.BaseTraining(), display)
        return Base(*tiny.load_base(path))

    def make_teacher(base: Path, display: Display) -> Path:
        return train("Train distill's teacher", TEACHER, display)

    return Recipe(
        name="tiny Qwen3 (0.8M parameters)",
        problems=worksheet_rows(TRAIN_ROWS, seed=asked.seed),
        solutions=asked.solutions,
        held_out_rows=worksheet_rows(asked.problems or 400, seed=HELD_OUT_SEED, held_out=True),
        grader=WorksheetGrader(),
        make_base=make_base,
        sections=SECTIONS,
        methods=METHODS,
        make_teacher=make_teacher,
        verifier=by_row("right_share", lambda text, row: right_share(text, row["answer"])),
    )

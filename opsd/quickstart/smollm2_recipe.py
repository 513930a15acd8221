"""The recipe of `opsd quickstart`: SmolLM2-135M-Instruct learns short sums.

The pretrained model gets a cold start by SFT, on both roles' prompts and in its own style. Then
each method trains it on new problems, whose solutions are in another style, by default words.
"""

import shutil
from pathlib import Path
from sys import maxsize

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.precision import compute_dtype
from opsd.config.config import Config
from opsd.config.load import save_config
from opsd.config.sections import ModelSection
from opsd.data.length_filter import tokens_needed
from opsd.data.rows import Row
from opsd.grading.grader import Grader
from opsd.models.copies import copy_model
from opsd.models.load import load_model, window
from opsd.quickstart.chain_sum import TEACHER_SEED, make_chain_sum, make_rows, own_style
from opsd.quickstart.download import smollm2_gguf
from opsd.quickstart.recipe import Base, Recipe, merge
from opsd.quickstart.settings import Asked, settings
from opsd.training.held_out import HeldOut
from opsd.training.run import run

COLD_STEPS = 14
COLD_ROWS = 16  # rows per step; each is trained in both roles
TRAIN_ROWS = 800
# Few suffice for accuracies near 0 (the pretrained model) and near 1 (the teacher).
FEW_PROBLEMS = 100
TEACHER_STEPS = 60  # steps of SFT, in the base's own style, that train distill's teacher

SECTIONS, METHODS = settings("smollm2")


def smollm2_recipe(asked: Asked) -> Recipe:
    """The recipe for these arguments; by default with 800 solutions, more than a method needs."""
    cold_steps = asked.steps or COLD_STEPS
    task = make_chain_sum(
        asked.seed,
        cold_start=cold_steps * COLD_ROWS,
        train=TRAIN_ROWS,
        held_out=asked.problems or 300,
        solution_style=asked.solution_style,
    )

    def make_base(directory: Path, held_out, display: Display) -> Base:
        own = {"path": asked.model}
        if asked.model is None:
            file = smollm2_gguf(display)
            own = {"path": str(file.parent), "gguf_file": file.name}
        section = ModelSection(**own)
        with display.stage("Load the pretrained model"):
            model, tokenizer = load_model(section)
        _check_window(held_out(tokenizer), task.train, model, asked)
        decoder = copy_model(model, compute_dtype("auto"))
        first = held_out(tokenizer).first(FEW_PROBLEMS)
        pretrained = first.evaluate(decoder, display, "student", "pretrained model")
        del decoder
        roles = {"loss": {"roles": ["student", "teacher"]}}
        cold = _own_style_config(section, directory / "cold_start", asked.seed, cold_steps, roles)
        rows = [_in_own_style(row) for row in task.cold_start]
        _learn(cold, model, tokenizer, rows, grader, display, save=False)
        return Base(model, tokenizer, pretrained)

    def make_teacher(base: Path, display: Display) -> Path:
        place = base / "teacher"
        if (place / "summary.json").is_file():  # an interrupted quickstart has made it
            return place / "model"
        start = ModelSection(path=str(base / "model"))
        roles = {"loss": {"roles": ["student"]}}
        config = _own_style_config(start, place, asked.seed, TEACHER_STEPS, roles)
        model, tokenizer = load_model(start)
        avoid = {row.problem for row in task.held_out}
        rows = make_rows(TEACHER_SEED + asked.seed, TEACHER_STEPS * COLD_ROWS, avoid=avoid)
        _learn(config, model, tokenizer, [_in_own_style(row) for row in rows], grader, display)
        return place / "model"

    grader = Grader()
    return Recipe(
        name=asked.model or "SmolLM2-135M-Instruct",
        problems=task.train,
        solutions=asked.solutions,
        held_out_rows=task.held_out,
        grader=grader,
        make_base=make_base,
        sections=SECTIONS,
        methods=METHODS,
        make_teacher=make_teacher,
        teacher_problems=FEW_PROBLEMS,
    )


def _check_window(test: HeldOut, rows: list[Row], model, asked: Asked) -> None:
    """Raise UserError if the model's window is too small for a sum, its solution and its answer."""
    longest = test.sampling.max_new_tokens
    needed = tokens_needed([*test.rows, *rows], test.prompts, ("student", "teacher"), longest)
    if (most := window(model.config) or maxsize) < max(needed):
        raise UserError(
            f"--model is {asked.model!r}: its window is {most} tokens, and the longest sum takes "
            f"{max(needed)} with its solution and an answer; choose a model with a larger window"
        )


def _learn(config: Config, model, tokenizer, rows: list[Row], grader, display, save=True) -> None:
    directory = Path(config.output.dir)
    shutil.rmtree(directory, ignore_errors=True)  # an interrupted quickstart may have left it
    directory.mkdir()
    save_config(config, directory / "config.yaml")
    run(config, model, tokenizer, rows, [], grader, display, save=save)


def _own_style_config(
    model: ModelSection, directory: Path, seed: int, steps: int, roles: dict
) -> Config:
    train = {"steps": steps, "warmup_steps": min(3, steps), "learning_rate": 1e-4, "seed": seed}
    own = {"method": "sft", "model": model.model_dump(), "output": {"dir": str(directory)}}
    own |= {"train": train | {"problems_per_step": COLD_ROWS}, "eval": {"problems": 0}}
    own |= {"data": {"source": "reasoning_gym:chain_sum"}, "prompts": {"target": "{{ own_style }}"}}
    return Config.model_validate(merge(SECTIONS, merge(own, roles)))


def _in_own_style(row: Row) -> Row:
    columns = {**row.columns, "own_style": own_style(row.columns["expression"])}
    return Row(row.problem, row.solution, row.answer, columns)

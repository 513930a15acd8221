"""Do the tiny study's models still do what the base could besides? Prints other-tasks-tiny.csv.

    python docs/results/other_tasks_tiny.py runs/study-tiny

The tasks: worksheets, as trained; worksheets of three pieces; worksheets with the solution shown,
which the base learned too. Each answer counts if all of its results are right.
"""

import math
import random
import sys
from pathlib import Path

import torch

from opsd.common.display import Display
from opsd.config.sections import PromptsSection
from opsd.data.prompts import Prompts
from opsd.quickstart import worksheet
from opsd.quickstart.tiny_model import load_base
from opsd.quickstart.tiny_recipe import HELD_OUT_SEED, SECTIONS
from opsd.rollout import Sampling
from opsd.training.held_out import HeldOut

PROBLEMS, SAMPLES, LONGEST = 100, 16, 60


def three_pieces() -> list:
    rng, rows = random.Random("other task 3"), {}
    while len(rows) < PROBLEMS:
        items = [worksheet._item(rng) for _ in range(3)]
        problem = ";".join(question for question, _ in items)
        rows[problem] = worksheet._row(problem, items)
    return list(rows.values())


def pass_at(k: int, right: int) -> float:
    """The unbiased estimate for a problem with this many right answers of SAMPLES."""
    return 1 - math.comb(SAMPLES - right, k) / math.comb(SAMPLES, k)


def measure(place: Path, role: str, rows: list, seed: int) -> list[float]:
    """pass@1, 4 and 16 at temperature 1."""
    model, tokenizer = load_base(place)
    prompts = Prompts(PromptsSection(**SECTIONS["prompts"]), tokenizer)
    sampling = Sampling(LONGEST, temperature=1.0, batch_size=512)
    repeated = [row for row in rows for _ in range(SAMPLES)]
    test = HeldOut(repeated, prompts, worksheet.WorksheetGrader(), sampling)
    torch.manual_seed(seed)
    right = [
        grade.correct
        for grade in test.evaluate(model.eval(), Display(file=sys.stderr), role).grades
    ]
    counts = [sum(right[i : i + SAMPLES]) for i in range(0, len(right), SAMPLES)]
    return [100 * sum(pass_at(k, n) for n in counts) / PROBLEMS for k in (1, 4, 16)]


def main(study: Path) -> None:
    held_out = worksheet.worksheet_rows(PROBLEMS, seed=HELD_OUT_SEED, held_out=True)
    tasks = {
        "worksheets": ("student", held_out),
        "three pieces": ("student", three_pieces()),
        "solution shown": ("teacher", held_out),
    }
    print("seed,model,task,pass@1,pass@4,pass@16")
    for directory in sorted(study.glob("*/seed-*/")):
        seed = int(directory.name.removeprefix("seed-"))
        for name in ("base", "opsd", "grpo"):
            for task, (role, rows) in tasks.items():
                shares = measure(directory / name / "model", role, rows, seed)
                print(seed, name, task, *(f"{share:.1f}" for share in shares), sep=",", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The common form of both quickstarts: a task, a base model, and a config for each method."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opsd.common.display import Display
from opsd.config.config import Config
from opsd.config.load import merge, parse_config, with_overrides
from opsd.data.rows import Row
from opsd.grading.grader import Grader
from opsd.grading.rewards import Verifier
from opsd.training.held_out import Evaluation, HeldOut


@dataclass(frozen=True)
class Base:
    """The model that every method starts from, and its evaluation before the cold start."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pretrained: Evaluation | None = None  # None: the base was trained from scratch


class MakeBase(Protocol):
    """Makes the base of the quickstart in `directory`; may evaluate the pretrained model."""

    def __call__(
        self,
        directory: Path,
        held_out: Callable[[PreTrainedTokenizerBase], HeldOut],
        display: Display,
    ) -> Base: ...


@dataclass(frozen=True)
class Recipe:
    """All that distinguishes one quickstart from the other."""

    name: str  # the model's name in the report
    problems: list[Row]  # training problems, with the solutions for the teacher's prompt
    solutions: int | None  # how many of these solutions there are; None: all
    held_out_rows: list[Row]  # problems for evaluations
    grader: Grader
    make_base: MakeBase
    sections: dict[str, Any]  # config sections that all methods share
    methods: dict[str, dict[str, Any]]  # method → its own sections, merged into the shared ones
    # Makes distill's separate teacher, given the base's directory; returns its path.
    make_teacher: Callable[[Path, Display], Path]
    # GRPO's reward, if it is not the grade.
    verifier: Verifier | None = field(default=None)
    # How many held-out problems the teacher answers; None: all.
    teacher_problems: int | None = None


def method_config(
    recipe: Recipe, method: str, directory: Path, seed: int, display: Display
) -> Config:
    """The config of one method, for the model and the problems in `directory`/base.

    Makes the separate teacher that distill needs.
    """
    base = directory / "base"
    places: dict[str, Any] = {
        "model": {"path": str(base / "model")},
        "data": {"source": str(base / "train.jsonl")},
        "train": {"seed": seed},
        "eval": {"source": str(base / "held_out.jsonl"), "problems": len(recipe.held_out_rows)},
        "output": {"dir": str(directory / method)},
    }
    if method == "distill":
        places["teacher"] = {"path": str(recipe.make_teacher(base, display))}
    config = _parsed(method, recipe.sections, recipe.methods[method], places)
    if config.prompts.hold:
        config.data.source = str(base / "held.jsonl")
    return config


def _parsed(
    method: str, shared: dict[str, Any], own: dict[str, Any], places: dict[str, Any]
) -> Config:
    teacher = {"teacher": {"policy": "model"}} if method == "distill" else {}
    merged = merge(merge(merge(shared, teacher), own), places)
    return parse_config({**merged, "method": method})


def overridden(
    methods: dict[str, dict[str, Any]], overrides: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """A copy of the methods' own sections, with `[method.]section.field=value` applied.

    An override without a method applies to all. The shared sections do not change, so the base is
    made and evaluated as without overrides. Raises UserError.
    """
    changed = deepcopy(methods)
    for override in overrides:
        first, _, rest = override.partition(".")
        for method in [first] if first in methods else methods:
            with_overrides(changed[method], [rest if first in methods else override])
    return changed


def check_methods(sections: dict[str, Any], methods: dict[str, dict[str, Any]]) -> list[Config]:
    """The methods' configs. Raises UserError if a method's sections give an invalid one."""
    made = []
    for method, own in methods.items():
        places = {"model": {"path": "base"}, "data": {"source": "train.jsonl"}}
        places |= {"teacher": {"path": "teacher"}} if method == "distill" else {}
        made.append(_parsed(method, sections, own, {**places, "output": {"dir": "."}}))
    return made


def repeated(rows: list[Row], solutions: int | None, hold: bool = False) -> list[Row]:
    """As many rows as given, but only the first `solutions` of them, repeated; None: all rows.
    hold: three of four rows are others, without their solutions."""
    if solutions is None or solutions >= len(rows):
        return rows
    solved = cycle(rows[:solutions])
    if not hold:
        return list(islice(solved, len(rows)))
    others = cycle(
        replace(row, solution="", columns={**row.columns, "solution": ""})
        for row in rows[solutions:]
    )
    each = (row for row in solved for row in (row, *islice(others, 3)))
    return list(islice(each, len(rows)))

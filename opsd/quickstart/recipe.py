"""What the two quickstarts have in common: a task, a base model, and a config a method."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
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
    """The model that every method starts from, and what it was before the cold start."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pretrained: Evaluation | None = None  # None: trained from scratch, so there is nothing before


class MakeBase(Protocol):
    """Makes the base in `directory`'s run; may evaluate the pretrained model on `held_out`."""

    def __call__(
        self,
        directory: Path,
        held_out: Callable[[PreTrainedTokenizerBase], HeldOut],
        display: Display,
    ) -> Base: ...


@dataclass(frozen=True)
class Recipe:
    """A quickstart."""

    name: str  # of the model, for the report
    train_rows: list[Row]  # problems to learn from, with the solutions that the teacher is shown
    held_out_rows: list[Row]  # problems to be measured on
    grader: Grader
    make_base: MakeBase
    sections: dict[str, Any]  # the config's sections, common to all methods
    methods: dict[str, dict[str, Any]]  # each method's own sections, merged into the common ones
    # Makes distill's separate teacher, beside the base's model; returns its path.
    make_teacher: Callable[[Path, Display], Path]
    # GRPO's, where it is not the grade.
    verifier: Verifier | None = field(default=None)
    # How many held-out problems the teacher answers; None: all.
    teacher_problems: int | None = None


def method_config(
    recipe: Recipe, method: str, directory: Path, seed: int, display: Display
) -> Config:
    """The config of one method, starting from the model and the problems in `directory`/base.

    A separate teacher, which distill needs, is made here.
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
    return _parsed(method, recipe.sections, recipe.methods[method], places)


def _parsed(
    method: str, shared: dict[str, Any], own: dict[str, Any], places: dict[str, Any]
) -> Config:
    teacher = {"teacher": {"policy": "model"}} if method == "distill" else {}
    merged = merge(merge(merge(shared, teacher), own), places)
    return parse_config({**merged, "method": method})


def overridden(
    methods: dict[str, dict[str, Any]], overrides: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The methods' own sections with `[method.]section.field=value` written into them.

    An override that names no method is for all of them. The sections that the methods share are
    left alone, so the base is made and measured as without overrides. Raises UserError.
    """
    changed = deepcopy(methods)
    for override in overrides:
        first, _, rest = override.partition(".")
        for method in [first] if first in methods else methods:
            with_overrides(changed[method], [rest if first in methods else override])
    return changed


def check_methods(sections: dict[str, Any], methods: dict[str, dict[str, Any]]) -> list[Config]:
    """The methods' configs. Raises UserError if a method's sections make no valid one."""
    made = []
    for method, own in methods.items():
        places = {"model": {"path": "base"}, "data": {"source": "train.jsonl"}}
        places |= {"teacher": {"path": "teacher"}} if method == "distill" else {}
        made.append(_parsed(method, sections, own, {**places, "output": {"dir": "."}}))
    return made


def repeated(rows: list[Row], solutions: int | None) -> list[Row]:
    """Repeats the first `solutions` rows until there are as many as before; None: no repeats."""
    if solutions is None or solutions >= len(rows):
        return rows
    return [rows[i % solutions] for i in range(len(rows))]

"""Reads a run's training and held-out rows: no problem is in both, and all fit the window."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd.common.display import Display
from opsd.common.errors import UserError
from opsd.common.templates import fill_in_columns
from opsd.config import requirements
from opsd.config.config import Config
from opsd.config.data import SHARED, DataSection, SourceSection
from opsd.data.context_check import ContextCheck
from opsd.data.length_filter import fitting_held_out, fitting_rows
from opsd.data.prompts import Prompts
from opsd.data.rows import Row, load_rows, mixture, split_rows, varied
from opsd.data.sources import is_remote
from opsd.grading.references import check_references

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SMALL = 1 << 23
"""Files of fewer bytes are read whole before torch is imported, in half a second."""

FEW, VISITS, VARIED = 256, 10, 3
"""Where fewer problems are each visited more often, OPSD tends to end below its base, unless others
hold it (docs/results.md): this many are then made of each."""


def load_data(
    config: Config,
    note: Callable[[str], None] | None = None,
    given: Any = None,
    given_held_out: Any = None,
) -> tuple[list[Row], list[Row]]:
    """Read the training rows and the held-out rows. A problem in both is dropped from the training
    rows, and `note` is called with a line that says so.

    given, given_held_out: records from Python, if the config names no source for them.
    """
    data, test, seed = config.data, config.eval, config.train.seed
    note = note or (lambda text: None)
    read = [(_read(source, config, note, given), source.weight) for source in sources(data)]
    rows = mixture(read, seed)
    _check_coefficients(config, rows)
    _check_routes(config, rows, note)
    if requirements.compares_answers(config):
        check_references(rows, "data.columns.answer", note)
    if test.problems == 0:
        return rows, []
    if test.source is None:
        return split_rows(rows, test.problems, seed, config.train.problems_per_step)
    held_out = _read_held_out(config, test.problems, given_held_out)
    known = {row.same_problem for row in held_out}
    kept = [row for row in rows if row.same_problem not in known]
    if len(kept) < len(rows):
        note(
            f"{len(rows) - len(kept)} training rows are left out: their problems are held out by "
            "eval.source (but for case and white space)"
        )
    return kept, held_out


def _check_coefficients(config: Config, rows: Sequence[Row]) -> None:
    """Raise UserError where coefficients in teacher.mix are not finite, or not positive in sum."""
    columns = [m.coefficient for m in config.teacher.mix if isinstance(m.coefficient, str)]
    for number, row in enumerate(rows if columns else (), start=1):
        for name in columns:
            value = row.columns.get(name)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise UserError(
                    f"teacher.mix: a coefficient is the column {name!r}, and it is {value!r} in "
                    f"training row {number}: it must be a finite number"
                )
        total = sum(m.coefficient_at(math.inf, row.columns) for m in config.teacher.mix)
        if total <= 0:
            said = f"the coefficients add up to {total:g} in training row {number}"
            raise UserError(f"teacher.mix: {said}; they must add up to more than 0")


def _check_routes(config: Config, rows: Sequence[Row], note: Callable[[str], None]) -> None:
    """Raises UserError for a row that names none of teacher.routes; tells of those without rows."""
    routes, column = config.teacher.routes, config.teacher.column
    unused = dict.fromkeys(routes)
    for number, row in enumerate(rows if routes else (), start=1):
        name = row.columns.get(column)
        if not isinstance(name, str) or name not in routes:
            said = f"is {name!r}" if column in row.columns else "is missing"
            raise UserError(
                f"teacher.column is {column!r}: it {said} in training row {number} "
                f"({row.problem[:40]!r}), and must name one of teacher.routes ({', '.join(routes)})"
            )
        unused.pop(name, None)
    if unused:
        note(f"teacher.routes: no training row names {', '.join(unused)}")


def _variations(
    config: Config, rows: Sequence[Row], held_out: Sequence[Row], held: bool, display: Display
) -> list[Row]:
    """Problems with other numbers, as `data.varied` asks, none of them held out. held: whether rows
    hold the student."""
    known, train = {row.same_problem for row in rows}, config.train
    visits, copies = train.steps * train.problems_per_step / (len(known) or 1), config.data.varied
    often = visits > VISITS and train.problems_per_step <= len(rows)  # else the run is refused
    few = config.method == "opsd" and not held and len(known) < FEW and often
    if copies is None:
        copies = VARIED if few and requirements.unvaried(config) is None else 0
    taken = known | {row.same_problem for row in held_out}
    made = [row for row in varied(rows, copies, train.seed) if row.same_problem not in taken]
    told = f"{len(known)} problems, each visited some {visits:.0f} times"
    if made:
        display.note(f"{told}: {len(made)} with other numbers hold the student (data.varied)")
    elif few:
        display.note(
            f"{told}: with so few OPSD tends to end below its base. Problems without solutions "
            "would hold it: see prompts.hold in docs/methods.md"
        )
    return made


def sources(data: DataSection) -> list[SourceSection]:
    """The sources in `data`."""
    if isinstance(data.source, list):
        return data.source
    return [SourceSection(source=data.source, **{name: getattr(data, name) for name in SHARED})]


def look_at_rows(config: Config) -> None:
    """Read the rows of small files, and the first row of each other local source. Raises UserError
    for a file that is missing, lacks a column, or has a row or too few that cannot be used."""
    named = [source.source for source in sources(config.data)]
    named += [config.eval.source] if config.eval.source and config.eval.problems else []
    files = [path for name in named if (path := Path(os.path.expanduser(name))).is_file()]
    if len(files) == len(named) and sum(path.stat().st_size for path in files) < SMALL:
        rows, _ = load_data(config)
        _check_enough(len(rows) * (1 + (config.data.varied or 0)), config)
        own = {} if requirements.shows_images(config) else requirements.own_templates(config)
        for name, text in own.items():
            fill_in_columns(f"prompts.{name}", text, [rows[0].columns | rows[0].texts])
        return
    for source in sources(config.data):
        if not is_remote(source.source):
            _read(source, config, lambda text: None, limit=1)
    if config.eval.source and config.eval.problems and not is_remote(config.eval.source):
        _read_held_out(config, limit=1)


def _check_enough(count: int, config: Config) -> None:
    if count < config.train.problems_per_step:
        wanted = f"train.problems_per_step ({config.train.problems_per_step})"
        raise UserError(f"data.source has {count} training rows: {wanted} may be at most that")


def _read_held_out(config: Config, limit: int, given: Any = None) -> list[Row]:
    data, test = config.data, config.eval
    return load_rows(
        test.source if given is None else given,
        columns=data.columns if test.columns is None else test.columns,
        split=test.split,
        default_split="test",
        limit=limit,
        seed=config.train.seed + 1,
        options=data.options if test.options is None else test.options,
        require=("problem", "answer"),
        section="eval",
    )


def _read(
    source: SourceSection,
    config: Config,
    note: Callable[[str], None],
    given: Any = None,
    limit: int | None = None,
) -> list[Row]:
    rows = load_rows(
        source.source if given is None else given,
        **{name: getattr(source, name) for name in ("columns", "split", "options")},
        limit=limit or source.limit,
        size=config.data.size,
        seed=config.train.seed,
        require=requirements.required_columns(config),
        graded=requirements.compares_answers(config),
        skip_incomplete=config.data.incomplete == "skip",
        note=note,
    )
    if source.teacher is None:
        return rows
    named = {config.teacher.column: source.teacher}
    return [replace(row, columns=row.columns | named) for row in rows]


def make_prompts(
    config: Config, architecture: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> Prompts:
    """The run's prompts for a model of this architecture; the tokenizer gets the teachers' tokens
    and the reader of images. Raises UserError for a teacher, or images, that it cannot have."""
    from opsd.models.images import ImageReader  # rows are read without transformers
    from opsd.models.teacher import check_teacher

    what = config.model, architecture, tokenizer
    tokenizer.teachers_tokens = check_teacher(config.teacher, *what)
    tokenizer.images = ImageReader(*what) if requirements.shows_images(config) else None
    return Prompts(config.prompts, tokenizer)


def fitting_data(
    config: Config,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    prompts: Prompts,
    window: int | None,
    display: Display,
) -> tuple[list[Row], list[Row]]:
    """The training rows and held-out rows that fit the window; shows notes about the others.

    Raises UserError for rows that do not fit, unless `prompts.too_long` is skip; if fewer rows
    remain than a step needs; and for rows whose text is missing from the contexts.
    """
    roles = requirements.trained_roles(config)
    teaches = requirements.uses_teacher_prompt(config) and config.method != "sft"
    own_weights = all(own.policy != "model" for own in config.teacher.members())
    check = ContextCheck(prompts, roles, teaches and own_weights, requirements.uses_targets(config))
    holds = any(prompts.holds(row, role) for row in rows for role in prompts.chats)
    rows = [*rows, *_variations(config, rows, held_out, holds, display)]
    check_held_out = ContextCheck(prompts, ["student"])
    for number, row in enumerate(held_out, start=1):
        check_held_out(number, row)
    with display.stage("Check the rows' lengths", total=len(rows)) as stage:
        rows = fitting_rows(
            rows,
            prompts,
            roles,
            requirements.longest_rollout(config),
            window,
            display.note,
            stage.advance,
            check,
        )
        if requirements.uses_targets(config) and not requirements.learns_targets(config):
            rows = fitting_rows(rows, prompts, ["student"], None, window, display.note)
        _check_enough(len(rows), config)
        # Render the longest row, to see whether the chat template cuts long texts.
        prompts.contexts([max(rows, key=lambda row: len(row.problem) + len(row.solution))])
        held_out = fitting_held_out(
            held_out,
            prompts,
            requirements.held_out_teacher_role(config),
            None if config.eval.teacher else config.eval.samples,
            requirements.longest_answer(config),
            window,
            "data.source" if config.eval.source is None else "eval.source",
            display.note,
        )
    if held := sum(any(prompts.holds(row, role) for role in prompts.chats) for row in rows):
        display.note(f"{held} of {len(rows)} rows have no solution: they hold the student")
    for said in check.notes():
        display.note(said)
    if teaches and (differ := prompts.different_endings()) is not None:
        display.note(differ)
    return rows, held_out

"""Show a study with several cells: each method's accuracy by variant, or by solutions and style."""

# ruff: noqa: RUF001 - the dashes are intended: people read them

from __future__ import annotations

from urllib.parse import quote

from opsd.compare.comparison import Comparison, Method
from opsd.compare.page import difference, share
from opsd.compare.ratios import interpolate, over_seeds
from opsd.compare.study import Study
from opsd.data.solution_styles import SOLUTION_STYLES
from opsd.report.render import render


def study_columns(study: Study, comparisons: dict[str, Comparison]) -> list[str]:
    """The column names of the table: first those that describe a row, then the methods."""
    first = next(iter(comparisons.values()))
    names = [method.name for method in first.methods]
    if study.variants:
        own = (column for name in names for column in (name, f"{name}, against the first"))
        return ["variant", "tokens", *own]
    return ["solutions", "their style", "tokens", *names]


def study_rows(study: Study, comparisons: dict[str, Comparison]) -> list[list[str]]:
    """The row of each cell: each method's accuracy at the budget, with its interval over seeds; for
    a variant also the difference from the first variant, computed seed by seed."""
    first = comparisons[study.cells[0].name]
    rows = []
    for cell in study.cells:
        comparison = comparisons[cell.name]
        style = SOLUTION_STYLES[cell.solution_style]
        if study.quickstart == "tiny":
            style = "the result first"
        row = [cell.name] if study.variants else [str(cell.solutions), style]
        row.append(f"{comparison.budget:,.0f}")
        for method, other in zip(comparison.methods, first.methods, strict=True):
            row.append(share(method.accuracy_at_budget))
            if study.variants:
                pairs = zip(_at(comparison, method), _at(first, other), strict=True)
                gain = difference(over_seeds([a - b for a, b in pairs]))
                row.append("–" if comparison is first else gain)
        rows.append(row)
    return rows


def _at(comparison: Comparison, method: Method) -> list[float]:
    """Each seed's accuracy at the budget, in the study's order of seeds."""
    return [interpolate(run.curve, comparison.budget) for run in method.runs]


def study_notes(comparisons: dict[str, Comparison]) -> list[str]:
    """A note on all cells, then those of the comparisons: what all say once, the rest by cell."""
    seeds = (
        "Held-out accuracy, in percent, at the largest budget that all runs of the row have; in "
        "brackets 90 % intervals over seeds (Student's t), where there are several. Differences "
        "are in points, seed by seed."
    )
    said = [one.notes for one in comparisons.values()]
    shared = [note for note in said[0] if all(note in notes for notes in said)]
    named = ((name, note) for name, one in comparisons.items() for note in one.notes)
    return [seeds, *shared, *(f"{name}: {note}" for name, note in named if note not in shared)]


def study_page(study: Study, comparisons: dict[str, Comparison]) -> str:
    """The study's page: one HTML document that loads no other files and links each comparison."""
    note, *warnings = study_notes(comparisons)
    return render(
        "study.html",
        study=study,
        columns=study_columns(study, comparisons),
        rows=study_rows(study, comparisons),
        links=[quote(f"{name}/comparison.html") for name in comparisons],  # escape names for URLs
        warnings=warnings,
        note=note,
    )

"""A study with several variants for people to read: accuracy by solutions and style."""

# ruff: noqa: RUF001 - dashes for people to read are meant as such

from __future__ import annotations

from opsd.compare.comparison import Comparison, Method
from opsd.compare.page import document, points, share
from opsd.compare.ratios import interpolate, over_seeds
from opsd.compare.study import Study
from opsd.data.solution_styles import SOLUTION_STYLES
from opsd.report.markup import Html, tag


def study_columns(study: Study, comparisons: dict[str, Comparison]) -> list[str]:
    """The table's heads: what a row is, then the methods."""
    first = next(iter(comparisons.values()))
    names = [method.name for method in first.methods]
    if study.variants:
        own = (column for name in names for column in (name, f"{name}, against the first"))
        return ["variant", "tokens", *own]
    return ["solutions", "their style", "tokens", *names]


def study_rows(study: Study, comparisons: dict[str, Comparison]) -> list[list[str]]:
    """A row a cell: each method's accuracy at the budget, with its interval over seeds; of a
    variant also the difference, seed by seed, from the first one's."""
    first = comparisons[study.cells[0].name]
    lines = []
    for cell in study.cells:
        comparison = comparisons[cell.name]
        tokens = f"{comparison.budget:,.0f}"
        accuracies = [share(method.at_budget) for method in comparison.methods]
        if not study.variants:
            style = (
                "the result first"
                if study.quickstart == "tiny"
                else SOLUTION_STYLES[cell.solution_style]
            )
            lines.append([str(cell.solutions), style, tokens, *accuracies])
            continue
        line = [cell.name, tokens]
        for accuracy, method, other in zip(
            accuracies, comparison.methods, first.methods, strict=True
        ):
            pairs = zip(_at(comparison, method), _at(first, other), strict=True)
            same = comparison is first
            line += [accuracy, "–" if same else points(over_seeds([a - b for a, b in pairs]))]
        lines.append(line)
    return lines


def _at(comparison: Comparison, method: Method) -> list[float]:
    """Each seed's accuracy at the budget; the seeds are in the study's order."""
    return [interpolate(run.curve, comparison.budget) for run in method.runs]


def study_notes(comparisons: dict[str, Comparison]) -> list[str]:
    """What is said once, of all cells."""
    seeds = (
        "Held-out accuracy, in percent, at the largest budget that all runs of the row have; in "
        "brackets 90 % intervals over seeds (Student's t), where there are several. Differences "
        "are in points, seed by seed."
    )
    return [seeds, *sorted({note for one in comparisons.values() for note in one.notes})]


def study_page(study: Study, comparisons: dict[str, Comparison]) -> str:
    """The page: one HTML document that loads nothing and links each variant's comparison."""
    head = tag("tr", [tag("th", name, scope="col") for name in study_columns(study, comparisons)])
    lines = []
    for name, row in zip(comparisons, study_rows(study, comparisons), strict=True):
        link = tag("a", row[0], href=f"{name}/comparison.html")
        lines.append(tag("tr", tag("th", link, scope="row"), [tag("td", cell) for cell in row[1:]]))
    note, *warnings = study_notes(comparisons)
    table = tag(
        "section",
        tag("h2", "Held-out accuracy"),
        tag("div", tag("table", tag("thead", head), tag("tbody", lines)), class_="scroll"),
        [tag("p", text, class_="warning") for text in warnings],
        tag("p", note, class_="note"),
        id="study",
    )
    seeds = ", ".join(map(str, study.seeds))
    return document("A study", f"{study.quickstart} quickstart, seeds {seeds}", [table], Html(""))

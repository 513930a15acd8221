"""A study with several variants for people to read: accuracy by solutions and voice."""

from __future__ import annotations

from opsd.compare import Comparison
from opsd.compare_page import document, share
from opsd.report.markup import Html, tag
from opsd.study import Study, variant_name

VOICES = {
    "words": "somebody else's, in words",
    "own": "the model's own",
    "terse": "terse: the result alone",
    "markdown": "another model's, in Markdown",
}


def study_columns(comparisons: dict[str, Comparison]) -> list[str]:
    """The table's heads: solutions, voice, then the methods."""
    first = next(iter(comparisons.values()))
    return ["solutions", "their voice", "tokens", *(method.name for method in first.methods)]


def study_rows(study: Study, comparisons: dict[str, Comparison]) -> list[list[str]]:
    """A row a variant: each method's accuracy at the budget, with its interval over seeds."""
    tiny = study.quickstart == "tiny"
    return [
        [
            str(count),
            "the result first" if tiny else VOICES[voice],
            f"{comparison.budget:,.0f}",
            *(share(method.at_budget) for method in comparison.methods),
        ]
        for count, voice in study.variants
        for comparison in [comparisons[variant_name(count, voice)]]
    ]


def study_page(study: Study, comparisons: dict[str, Comparison]) -> str:
    """The page: one HTML document that loads nothing and links each variant's comparison."""
    head = tag("tr", [tag("th", name, scope="col") for name in study_columns(comparisons)])
    lines = []
    for name, row in zip(comparisons, study_rows(study, comparisons), strict=True):
        link = tag("a", row[0], href=f"{name}/comparison.html")
        lines.append(tag("tr", tag("th", link, scope="row"), [tag("td", cell) for cell in row[1:]]))
    note = (
        "Held-out accuracy at the largest budget that all runs of the row have; in brackets 90 % "
        "intervals over seeds (Student's t), where there are several."
    )
    notes = {note for comparison in comparisons.values() for note in comparison.notes}
    table = tag(
        "section",
        tag("h2", "Accuracy by what there is to learn from"),
        tag("div", tag("table", tag("thead", head), tag("tbody", lines)), class_="scroll"),
        [tag("p", text, class_="warning") for text in sorted(notes)],
        tag("p", note, class_="note"),
        id="study",
    )
    seeds = ", ".join(map(str, study.seeds))
    return document("A study", f"{study.quickstart} quickstart, seeds {seeds}", [table], Html(""))

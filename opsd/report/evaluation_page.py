"""An evaluation's page: the result, what was asked, and the completions to read.

One HTML document that loads nothing and runs no script. Needs no torch.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from importlib import resources
from typing import Any

from opsd.common.format import percent
from opsd.data.rows import Row
from opsd.evaluate.result import Answer, remarks, table
from opsd.report.markup import Html, tag

MAX_PROBLEMS = 300
MAX_SAMPLES = 8  # of one problem: right, wrong and cut-off ones are all kept
MAX_CHARACTERS = 12_000  # of one completion, the middle left out; a page must open on a phone
OPEN_CHARACTERS = 1_200  # longer completions, and cut-off ones, are folded

_NO_HTML = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def page(result: dict[str, Any], rows: Sequence[Row], answers: Sequence[Sequence[Answer]]) -> str:
    """The whole page; `answers` holds each row's answers."""
    title = f"{result['model']} on {result['benchmark']}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{_clean(title)} · opsd eval"),
        tag("style", Html(_style("report.css") + _style("evaluation.css"))),
    )
    body = tag(
        "body",
        _header(result),
        tag("main", _result(result), _problems(rows, answers), _asked(result)),
        tag("footer", tag("p", f"Written {time.strftime('%Y-%m-%d %H:%M')} by opsd eval.")),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _style(name: str) -> str:
    return resources.files("opsd.report").joinpath("templates", name).read_text(encoding="utf-8")


def _header(result: dict[str, Any]) -> Html:
    facts = [f"{result['problems']:,} problems", f"{result['samples']} answers each"]
    return tag(
        "header",
        tag("p", "opsd eval", class_="eyebrow"),
        tag("h1", _clean(f"{result['model']} on {result['benchmark']}")),
        tag("p", " · ".join(facts), class_="quiet"),
    )


def _result(result: dict[str, Any]) -> Html:
    lines = [
        tag("tr", tag("th", name, scope="row"), tag("td", rate), tag("td", interval))
        for name, rate, interval in table(result)
    ]
    columns = tag("tr", [tag("th", text, scope="col") for text in ("", "rate", "95 % interval")])
    note = (
        "Intervals are what the choice of problems leaves open (bootstrap over problems). "
        "pass@k is the unbiased estimate; maj@k lets the answers of a problem vote, ties shared."
    )
    return tag(
        "section",
        tag("h2", "Result"),
        tag("p", tag("strong", percent(result["accuracy"])), class_="big"),
        tag("div", tag("table", tag("thead", columns), tag("tbody", lines), class_="metrics"),
            class_="scroll"),
        [tag("p", remark) for remark in remarks(result)],
        tag("p", note, class_="note"),
        id="result",
    )  # fmt: skip


def _asked(result: dict[str, Any]) -> Html:
    names = (
        "model", "model_digest", "benchmark", "source", "revision", "benchmark_digest", "samples",
        "temperature", "top_p", "top_k", "max_new_tokens", "thinking", "seed", "precision",
    )  # fmt: skip
    known = [(name, result[name]) for name in names if result.get(name) is not None]
    groups = [
        ("Evaluation", known),
        ("Versions", list((result.get("versions") or {}).items())),
        ("Machine", list((result.get("machine") or {}).items())),
    ]
    boxes = [
        tag("div", tag("h3", title), tag("dl", [_fact(*pair) for pair in pairs]))
        for title, pairs in groups
        if pairs
    ]
    return tag("section", tag("h2", "What ran"), tag("div", boxes, class_="facts"), id="ran")


def _fact(name: str, content: Any) -> list[Html]:
    text = content if isinstance(content, str) else json.dumps(content)
    return [tag("dt", name.replace("_", " ")), tag("dd", _clean(text))]


def _problems(rows: Sequence[Row], answers: Sequence[Sequence[Answer]]) -> Html:
    shown = list(zip(rows, answers, strict=True))[:MAX_PROBLEMS]
    chips = [
        tag("li", tag("a", str(number), href=f"#p{number}", class_=_kind(problem),
                      title=f"{_right(problem)} of {len(problem)} right"))
        for number, (_, problem) in enumerate(shown, start=1)
    ]  # fmt: skip
    articles = [_problem(number, *pair) for number, pair in enumerate(shown, start=1)]
    rest = len(rows) - len(shown)
    return tag(
        "section",
        tag("h2", "Problems and answers"),
        tag("p", "Underlined green: every answer is right; red: none; grey: some.", class_="note"),
        tag("ul", chips, class_="chips"),
        articles,
        tag("p", f"{rest} more problems are in answers.jsonl.", class_="note") if rest else None,
        id="problems",
    )


def _right(problem: Sequence[Answer]) -> int:
    return sum(answer.grade.correct for answer in problem)


def _kind(problem: Sequence[Answer]) -> str:
    right = _right(problem)
    return "all" if right == len(problem) else "some" if right else "none"


def _problem(number: int, row: Row, problem: Sequence[Answer]) -> Html:
    facts = [
        tag("dt", "Problem"),
        tag("dd", tag("span", _clean(row.problem), class_="verbatim")),
        tag("dt", "Answer"),
        tag("dd", tag("span", _clean(row.answer), class_="verbatim")),
    ]
    chosen = _chosen(problem)
    rest = len(problem) - len(chosen)
    return tag(
        "article",
        tag("h4", f"Problem {number} · {_right(problem)} of {len(problem)} right"),
        tag("dl", facts, class_="problem"),
        [_answer(answer) for answer in chosen],
        tag("p", f"{rest} more answers are in answers.jsonl.", class_="note") if rest else None,
        id=f"p{number}",
    )


def _chosen(problem: Sequence[Answer]) -> list[Answer]:
    """At most MAX_SAMPLES, of each kind some: round robin over right, wrong and cut off."""
    kinds: dict[tuple[bool, bool], list[Answer]] = {}
    for answer in problem:
        kinds.setdefault((answer.grade.correct, answer.completion.finished), []).append(answer)
    order = [group[i] for i in range(len(problem)) for group in kinds.values() if i < len(group)]
    return sorted(order[:MAX_SAMPLES], key=lambda answer: answer.completion.sample)


def _answer(answer: Answer) -> Html:
    completion, grade = answer.completion, answer.grade
    found = "no \\boxed answer" if grade.extracted is None else _clean(_middle(grade.extracted, 80))
    summary = [
        tag("span", f"#{completion.sample + 1}", class_="quiet"),
        tag("code", found),
        tag("span", _clean(grade.reason), class_="quiet"),
        tag("span", f"{completion.tokens:,} tokens", class_="quiet"),
        None if completion.finished else tag("span", "cut off", class_="quiet"),
        tag("span", "✓ right" if grade.correct else "✗ wrong",
            class_="right" if grade.correct else "wrong"),
    ]  # fmt: skip
    short = completion.finished and len(completion.text) <= OPEN_CHARACTERS
    text = _clean(_middle(completion.text, MAX_CHARACTERS))
    return tag(
        "details",
        tag("summary", summary),
        tag("div", text or "(nothing)", class_="said"),
        class_="answer",
        open=short,
    )


def _middle(text: str, longest: int) -> str:
    """The text, its middle left out where it is longer."""
    if len(text) <= longest:
        return text
    half = longest // 2
    gap = f" … {len(text) - 2 * half:,} characters … "
    return text[:half] + gap + text[-half:]


def _clean(text: str) -> str:
    """Without what HTML may not hold: control characters and lone surrogates, shown as U+FFFD."""
    return _NO_HTML.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))

"""Sample rollouts before and after training, each token shaded by its divergence."""

# ruff: noqa: RUF001 - dashes and minus signs for people to read are meant as such

import json
from collections.abc import Sequence

from opsd.report.markup import Html, tag
from opsd.runs.read import Record, Run, value

MAX_PROBLEMS = 12
MAX_TOKENS = 1500  # a rollout: more elements than that make a page that no phone scrolls
SHADES = 9
VISIBLE = {"\n": "⏎\n", "\r": "␍", "\t": "⇥\t", "": "∅"}


def sample_pairs(samples: Sequence[Record]) -> list[tuple[Record | None, Record | None]]:
    """(before, after) a problem: the rollouts of the first and of the last sampled step.

    A problem that was sampled at one of the two only is a pair with None. With one sampled step in
    all, every pair is (before, None).
    """
    steps = [value(sample, "step") or 0 for sample in samples]
    if not steps:
        return []
    first, last = min(steps), max(steps)
    pairs: dict[str, list[Record | None]] = {}
    for sample, step in zip(samples, steps, strict=True):
        if step in (first, last):
            pair = pairs.setdefault(str(sample.get("problem")), [None, None])
            pair[0 if step == first else 1] = sample
    return [(before, after) for before, after in pairs.values()]


def rollout_section(run: Run) -> Html | None:
    """The run's sample rollouts, two a row; None where it sampled none."""
    pairs = sample_pairs(run.samples)
    if not pairs:
        return None
    shown = pairs[:MAX_PROBLEMS]
    scale = divergence_scale([sample for pair in shown for sample in pair if sample])
    articles = [_problem(index, pair, scale) for index, pair in enumerate(shown, 1)]
    rest = len(pairs) - len(shown)
    more = f"{rest} more sampled problems are in samples.jsonl." if rest else None
    return tag(
        "section",
        _legend(scale) if scale else None,
        articles,
        tag("p", more, class_="note") if more else None,
        class_="rollouts",
    )


def divergence_scale(samples: Sequence[Record]) -> float | None:
    """The divergence of the darkest shade: the 95th percentile, so that one outlier does not pale
    all others. None where no token has a divergence."""
    found = sorted(
        divergence
        for sample in samples
        for token in _tokens(sample)
        if (divergence := value(token, "divergence")) is not None
    )
    return max(found[int(0.95 * (len(found) - 1))], 1e-3) if found else None


def shade(divergence: float, scale: float) -> int:
    """0…SHADES; by the square root, which keeps small divergences apart."""
    return round(SHADES * min(max(divergence, 0.0) / scale, 1.0) ** 0.5)


def _problem(index: int, pair: tuple[Record | None, Record | None], scale: float | None) -> Html:
    known = pair[1] or pair[0]
    assert known is not None
    facts = [
        tag("dt", "Problem"),
        tag("dd", _text(known.get("problem"))),
        tag("dt", "Reference solution, seen by the teacher only"),
        tag("dd", _text(known.get("solution"))),
    ]
    if known.get("answer") is not None:
        facts += [tag("dt", "Answer"), tag("dd", _text(known["answer"]))]
    columns = [
        _rollout(label, sample, scale)
        for label, sample in zip(("Before", "After"), pair, strict=True)
        if sample
    ]
    return tag(
        "article",
        tag("h4", f"Problem {index}"),
        tag("dl", facts, class_="problem"),
        tag("div", columns, class_="pair"),
    )


def _rollout(label: str, sample: Record, scale: float | None) -> Html:
    step = value(sample, "step")
    correct = sample.get("correct")
    mark = None
    if isinstance(correct, bool):
        mark = tag(
            "span", "✓ correct" if correct else "✗ wrong", class_="right" if correct else "wrong"
        )
    tokens = _tokens(sample)
    body = [_token(token, scale, first=i == 0) for i, token in enumerate(tokens[:MAX_TOKENS])]
    known = [d for token in tokens if (d := value(token, "divergence")) is not None]
    about = [f"{len(tokens)} tokens"] if tokens else []
    if known:
        about.append(f"mean divergence {sum(known) / len(known):.3f}")
    if len(tokens) > MAX_TOKENS:
        about.append(f"the first {MAX_TOKENS} are shown")
    return tag(
        "figure",
        tag(
            "figcaption",
            tag("b", label),
            tag("span", f"step {step:g}" if step is not None else None, class_="quiet"),
            mark,
        ),
        tag("div", body or _text(sample.get("completion")), class_="tokens"),
        tag("p", " · ".join(about), class_="quiet") if about else None,
    )


def _token(token: Record, scale: float | None, *, first: bool) -> Html:
    """One token; report.js reads the data attributes. Only a rollout's first token is a tab stop,
    the arrow keys lead on from there."""
    text = str(token.get("text", ""))
    divergence = value(token, "divergence")
    teacher = [
        [str(choice[0]), round(float(choice[1]), 4)]
        for choice in token.get("teacher") or []
        if isinstance(choice, (list, tuple))
        and len(choice) == 2
        and isinstance(choice[1], (int, float))
    ]
    classes = ["t"]
    if divergence is not None and scale:
        classes.append(f"d{shade(divergence, scale)}")
    if teacher and teacher[0][0] != text:
        classes.append("other")  # the teacher would have written something else
    probability = value(token, "student_probability")
    return tag(
        "span",
        _visible(text),
        class_=" ".join(classes),
        tabindex=0 if first else -1,
        data_text=text,
        data_d=None if divergence is None else f"{divergence:.4g}",
        data_p=None if probability is None else f"{probability:.4g}",
        data_teacher=json.dumps(teacher, ensure_ascii=False) if teacher else None,
    )


def _visible(text: str) -> list[Html | str]:
    """Text with its newlines and other blanks as faint signs."""
    if text == "":
        return [tag("i", VISIBLE[""])]
    return [tag("i", VISIBLE[char]) if char in VISIBLE else char for char in text]


def _text(content: object) -> Html:
    return tag("span", "–" if content is None else str(content), class_="verbatim")


def _tokens(sample: Record) -> list[Record]:
    found = sample.get("tokens")
    return [t for t in found if isinstance(t, dict)] if isinstance(found, list) else []


def _legend(scale: float) -> Html:
    shades = [tag("span", class_=f"d{i}") for i in range(SHADES + 1)]
    return tag(
        "p",
        "Divergence, nats: 0 ",
        tag("span", shades, class_="scale", aria_hidden="true"),
        f" {scale:.2g} or more. ",
        tag("span", "Underlined", class_="t other"),
        ": the teacher's first choice was another token. Point at a token, tap it, or use the "
        "arrow keys to see what the teacher preferred.",
        class_="note",
    )

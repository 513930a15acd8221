"""Prepare sample rollouts from before and after training for templates/rollouts.html."""

import re
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from opsd.runs.read import Run
from opsd.runs.records import Record

MAX_PROBLEMS = 12
MAX_TOKENS = 1500  # tokens shown of a rollout: with more elements a phone cannot scroll the page
SHADES = 9


def sample_pairs(samples: Sequence[Record]) -> list[tuple[Record | None, Record | None]]:
    """(before, after) of each problem: its rollouts in the first and the last sampled step.

    A problem that was sampled in only one of these steps has None for the other. If there is only
    one sampled step, every pair is (before, None).
    """
    steps = [sample["step"] for sample in samples]
    first, last = min(steps, default=0), max(steps, default=0)
    pairs: dict[str, list[Record | None]] = {}
    for sample, step in zip(samples, steps, strict=True):
        if step in (first, last):
            pair = pairs.setdefault(str(sample.get("problem")), [None, None])
            pair[0 if step == first else 1] = sample
    return [(before, after) for before, after in pairs.values()]


def sampled(run: Run) -> dict[str, Any] | None:
    """The run's sample rollouts, (before, after) of each problem; None if it sampled none."""
    pairs = sample_pairs(run.samples)
    shown = pairs[:MAX_PROBLEMS]
    scale = divergence_scale([sample for pair in shown for sample in pair if sample])
    problems = [[_rollout(sample, scale) if sample else None for sample in pair] for pair in shown]
    left_out = len(pairs) - len(shown)
    return {"scale": scale, "problems": problems, "left_out": left_out} if pairs else None


def divergence_scale(samples: Sequence[Record]) -> float | None:
    """The divergence of the darkest shade: the 95th percentile, so that a single outlier does not
    make all others pale. None if no token has a divergence."""
    found = sorted(d for sample in samples for d in _divergences(sample.get("tokens", [])))
    return max(found[int(0.95 * (len(found) - 1))], 1e-3) if found else None


def shade(divergence: float, scale: float) -> int:
    """A token's shade, 0…SHADES. It grows with the square root, which tells small ones apart."""
    return round(SHADES * min(max(divergence, 0.0) / scale, 1.0) ** 0.5)


def _rollout(sample: Record, scale: float | None) -> dict[str, Any]:
    tokens = sample.get("tokens", [])
    known = _divergences(tokens)
    texts = ("problem", "solution", "answer", "completion", "correct")
    return {
        **{name: sample.get(name) for name in texts},
        "step": sample["step"],
        "length": len(tokens),
        "divergence": fmean(known) if known else None,
        "tokens": [_token(token, scale) for token in tokens[:MAX_TOKENS]],
    }


def _token(token: Record, scale: float | None) -> dict[str, Any]:
    text, divergence = token.get("text", ""), token.get("divergence")
    teacher = [[choice, round(p, 4)] for choice, p in token.get("teacher") or [] if p is not None]
    classes = ["t"]
    if divergence is not None and scale:
        classes.append(f"d{shade(divergence, scale)}")
    if teacher and teacher[0][0] != text:
        classes.append("other")  # the teacher would have written something else
    return {
        "text": text,
        "pieces": [piece for piece in re.split(r"([\n\r\t])", text) if piece],
        "classes": " ".join(classes),
        "divergence": divergence,
        "probability": token.get("student_probability"),
        "teacher": teacher,
    }


def _divergences(tokens: Sequence[Record]) -> list[float]:
    return [d for token in tokens if (d := token.get("divergence")) is not None]

"""Benchmarks by name: where their problems are, what their columns are called, how they are
sampled.

A benchmark is a name from `KNOWN`, or any source that `opsd.data.load_rows` reads.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsd.data import REASONING_GYM, Row, load_rows
from opsd.errors import UserError


@dataclass(frozen=True)
class Convention:
    """How a benchmark is sampled unless the caller says otherwise; temperature 0 is greedy."""

    samples: int = 1
    temperature: float = 0.0
    max_new_tokens: int = 2048


@dataclass(frozen=True)
class Benchmark:
    """`prompt`: the benchmark's own Jinja template of the user message, None: the caller's."""

    name: str
    source: str
    rows: list[Row]
    convention: Convention = Convention()
    prompt: str | None = None


@dataclass(frozen=True)
class _Known:
    source: str
    split: str
    columns: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    convention: Convention = Convention()


# The OPSD paper's: avg@12 at temperature 1, up to 38 912 tokens.
_COMPETITION = Convention(samples=12, temperature=1.0, max_new_tokens=38_912)

KNOWN: Mapping[str, _Known] = {
    # The answer is the last line of the worked solution, after `####`: load_rows takes it out.
    "gsm8k": _Known(
        "openai/gsm8k",
        "test",
        columns={"problem": "question", "solution": "answer", "answer": "answer"},
        options={"name": "main"},
        convention=Convention(max_new_tokens=1024),
    ),
    "math-500": _Known(
        "HuggingFaceH4/MATH-500", "test", convention=Convention(max_new_tokens=4096)
    ),
    "aime24": _Known("HuggingFaceH4/aime_2024", "train", convention=_COMPETITION),
    "aime25": _Known("math-ai/aime25", "test", convention=_COMPETITION),
}
_OTHER_NAMES = {"math500": "math-500", "aime2024": "aime24", "aime2025": "aime25"}


def load_benchmark(
    name: str,
    *,
    source: str | None = None,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    size: int | None = None,
    options: Mapping[str, Any] | None = None,
    require: Sequence[str] = ("problem", "answer"),
) -> Benchmark:
    """The benchmark `name`: one of KNOWN (in any spelling of case, `-` and `_`), or a source.

    source: a local copy of a known benchmark, with the same columns.
    The rest is as for load_rows; what is given replaces the known benchmark's own. Elsewhere the
    split is "test" and reasoning_gym draws 200 problems. Raises UserError.
    """
    compact = name.lower().replace("-", "").replace("_", "")
    known = {key.replace("-", ""): key for key in KNOWN} | _OTHER_NAMES
    if compact in known:
        key = known[compact]
        entry = KNOWN[key]
        # A local copy has neither the hub's configurations nor, unless the caller says so, splits.
        inherited = entry.options if source is None else {}
    else:
        key, entry, inherited = name, _Known(name, "test"), {}
        if source is not None:
            raise UserError(f"benchmark: {name!r} is none of {', '.join(KNOWN)}, so it has no copy")
        _refuse_misspelling(name)
    where = source or entry.source
    if size is None and limit is None and where.startswith(REASONING_GYM):
        size = 200
    rows = load_rows(
        where,
        columns={**entry.columns, **(columns or {})},
        split=split or entry.split,
        limit=limit,
        seed=seed,
        size=size,
        options=options if options is not None else inherited,
        require=require,
        section="benchmark",
    )
    return Benchmark(key, where, rows, entry.convention)


def _refuse_misspelling(name: str) -> None:
    """A bare word that is no path is not worth the half minute that asking the hub may take."""
    if "/" in name or ":" in name or "." in name or Path(name).exists():
        return
    near = difflib.get_close_matches(name.lower(), KNOWN, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(
        f"benchmark: {name!r} is not known{hint} (allowed: {', '.join(KNOWN)}, a file, a directory "
        "saved by `datasets`, a hub name `owner/name`, or `reasoning_gym:<task>`)"
    )

"""Load benchmarks by name: each has a source, names of columns and a convention for sampling.

A benchmark is a name from `KNOWN`, or any source that `opsd.data.rows.load_rows` reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsd.common.errors import UserError
from opsd.common.files import read_toml
from opsd.common.near import did_you_mean
from opsd.data.rows import Row, load_rows
from opsd.data.sources import REASONING_GYM


@dataclass(frozen=True)
class Convention:
    """How to sample a benchmark unless the caller says otherwise; temperature 0 is greedy.

    thinking: `enable_thinking` for the chat template; None leaves it to the template.
    """

    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 2048
    thinking: bool | None = None


@dataclass(frozen=True)
class Benchmark:
    """Problems with answers. revision: their commit on the hub, None for other sources or if the
    hub could not be asked. left_out: number of problems left out since no parser can grade them."""

    name: str
    source: str
    rows: list[Row]
    convention: Convention = Convention()
    revision: str | None = None
    left_out: int = 0

    def digest(self) -> str:
        """A hash of all problems and answers, in order, that identifies the benchmark."""
        told = [(row.problem, row.answer, *(i.digest for i in row.images)) for row in self.rows]
        content = json.dumps(told)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Known:
    """An entry of benchmarks.toml; comments there explain the fields."""

    source: str
    split: str
    columns: Mapping[str, str] = field(default_factory=dict)
    name: str | None = None
    revision: str | None = None
    keep: tuple[str, Sequence[str]] | None = None
    also: Sequence[str] = ()
    convention: Convention = Convention()


KNOWN: Mapping[str, _Known] = {
    name: _Known(**entry | {"convention": Convention(**entry["convention"])})
    for name, entry in read_toml(__file__, "benchmarks").items()
}
_NAMES = {
    other: key for key, entry in KNOWN.items() for other in (key.replace("-", ""), *entry.also)
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def load_benchmark(
    name: str,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    revision: str | None = None,
) -> Benchmark:
    """Load a benchmark: one of KNOWN (whatever its case, `-` and `_`), or a source of rows.

    revision: of a hub dataset, instead of the pinned one. The other arguments are those of
    load_rows, but the default split is "test", and reasoning_gym draws 200 problems by default.
    Raises UserError.
    """
    compact = name.lower().replace("-", "").replace("_", "")
    if compact in _NAMES:
        key = _NAMES[compact]
        entry = KNOWN[key]
    else:
        key, entry = name, _Known(name, "test")
        _refuse_misspelling(name)
    where = entry.source
    on_hub = not os.path.exists(os.path.expanduser(where)) and bool(_HUB_NAME.fullmatch(where))
    if revision is not None and not on_hub:
        raise UserError(f"benchmark.revision: only a hub dataset has revisions, not {where!r}")
    options: dict[str, Any] = {}
    if on_hub:
        revision = revision or entry.revision or _current_revision(where)
        given = {"name": entry.name, "revision": revision}
        options = {key: value for key, value in given.items() if value is not None}
    rows = load_rows(
        where,
        columns={**entry.columns, **(columns or {})},
        split=split,
        default_split=entry.split,
        limit=None if entry.keep else limit,
        seed=seed,
        size=200 if limit is None and where.startswith(REASONING_GYM) else None,
        options=options,
        require=("problem", "answer"),
        section="benchmark",
    )
    kept = _gradable(rows, entry, where)
    version, skipped = options.get("revision"), len(rows) - len(kept)
    return Benchmark(key, where, kept[:limit], entry.convention, version, skipped)


def _gradable(rows: list[Row], entry: _Known, where: str) -> list[Row]:
    if entry.keep is None:
        return rows
    column, values = entry.keep
    if column not in rows[0].columns:
        raise UserError(
            f"benchmark.source: {where!r} has no column {column!r}, which says how an answer is "
            f"graded; it has {', '.join(map(repr, rows[0].columns))}"
        )
    kept = [row for row in rows if row.columns.get(column) in values]
    if not kept:
        raise UserError(f"benchmark.source: {where!r} has no row with {column} in {values}")
    return kept


def _current_revision(name: str) -> str | None:
    """The dataset's current commit on the hub, so that the loaded revision is the recorded one."""
    from huggingface_hub import HfApi

    from opsd.common.hub_offline import before_asking_hub

    before_asking_hub(name)
    try:
        return HfApi().dataset_info(name, timeout=10).sha
    except Exception:  # offline (there may be a cached copy) or absent: load_dataset will tell
        return None


def _refuse_misspelling(name: str) -> None:
    """Raises UserError for a bare word that is no path: asking the hub may take half a minute."""
    if "/" in name or ":" in name or "." in name or Path(name).exists():
        return
    one = "; one at a time" if "," in name else ""
    raise UserError(
        f"benchmark: {name!r} is not known{one or did_you_mean(name, KNOWN)} (allowed: "
        f"{', '.join(KNOWN)}, a file, a directory saved by `datasets`, a hub name `owner/name`, or "
        "`reasoning_gym:<task>`)"
    )

"""The config's `data` section, with the sources that it may list.

`opsd train --help` prints the docstrings below the fields.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from opsd.config.base import Count, Natural, Section


class SourceSection(Section):
    """One source of several. Fields that it leaves out are data's."""

    source: str
    """As data.source."""
    weight: float = Field(1.0, gt=0, le=1000)
    """How many times each of its rows is in the training data."""
    columns: dict[str, str] = Field({})
    """As data.columns."""
    split: str | None = None
    """As data.split."""
    limit: Count | None = None
    """As data.limit."""
    options: dict[str, Any] = Field({})
    """As data.options."""
    teacher: str | None = None
    """Which of teacher.routes teaches its rows; none: the one that each row names."""


def _named(source: Any) -> Any:
    return {"source": source} if isinstance(source, str) else source


Source = Annotated[
    SourceSection, BeforeValidator(_named, json_schema_input_type=str | SourceSection)
]
SHARED = ("columns", "split", "limit", "options")
"""Fields that a source of several takes from `data` where it leaves them out."""


class DataSection(Section):
    """The training data: rows with a problem, a solution and an answer."""

    source: str | list[Source]
    """A file (JSON lines, JSON, CSV, TSV, parquet; also gzipped), a directory saved by `datasets`,
    a hub name, or reasoning_gym:<task>. Or a list of these, each a name or a mapping with source,
    weight, columns, split, limit and options."""
    incomplete: Literal["error", "skip"] = "error"
    """What to do with a row that lacks a column's text: stop, or leave it out and count it."""
    columns: dict[str, str] = Field({})
    """Our column (problem, solution, answer, images) → the source's; dots reach into a column. One
    of images has one or several, as bytes, paths or `datasets` keep them."""
    split: str | None = None
    """Split of a dataset that has several; none: train. Files have none."""
    limit: Count | None = None
    """Use at most this many rows."""
    size: int | None = Field(None, ge=1, le=10_000_000)
    """reasoning_gym: how many problems to draw."""
    options: dict[str, Any] = Field({})
    """reasoning_gym: the task's own options."""
    varied: Natural | None = None
    """opsd: problems made of each row, with other numbers and no solution, which hold the student.
    none: 3 where few problems would be visited often (docs/methods.md), else 0."""

    @field_validator("source", mode="before")
    @classmethod
    def _check_source(cls, source: Any) -> Any:
        if not isinstance(source, str | list) or not source:
            raise ValueError("it must be a source's name, or a list of sources")
        return source

    @model_validator(mode="after")
    def _share(self) -> Self:
        shared = {name: getattr(self, name) for name in SHARED}
        for one in self.source if isinstance(self.source, list) else ():
            for name in {*shared} - one.model_fields_set:
                setattr(one, name, shared[name])
        return self

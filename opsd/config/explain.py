"""What is wrong with a config, in sentences: the field, the value, what it may be."""

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from opsd.common.errors import problem_said
from opsd.common.files import read_toml
from opsd.config.base import Section

SHOWN_PROBLEMS = 10  # of one config
ELSEWHERE: dict[str, str] = read_toml(__file__, "elsewhere")
"""Names that TRL and others have for a field, or that it had here once → its name."""


def explain_all(error: ValidationError, model: type[Section]) -> str:
    """pydantic's errors as sentences; if there are many, the first ones."""
    problems = error.errors()
    said = [explain(problem, model) for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        said.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
    return "; ".join(said)


def explain(problem: Any, model: type[Section]) -> str:
    """One pydantic error of `model` as a sentence: the field, the value, what is allowed."""
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] in ("extra_forbidden", "invalid_key"):
        if here := ELSEWHERE.get(location[-1]):
            return f"unknown key {name!r}: here it is {here}"
        known = _known(location[:-1], model)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        where = f"in section {'.'.join(location[:-1])!r}" if len(location) > 1 else "at the top"
        return f"unknown key {location[-1]!r} {where}; {hint}"
    if problem["type"] == "missing":
        return f"{'.'.join(location)} is missing"
    return problem_said(problem)


def _known(location: Sequence[str], model: Any) -> list[str]:
    for part in location:
        if part.isdigit():  # a place in a list
            continue
        model = section_of(model.model_fields[part].annotation)
    return list(model.model_fields)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds, or may hold; None if it holds values."""
    kinds = getattr(annotation, "__args__", None) or (annotation,)
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)

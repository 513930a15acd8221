"""Replace the numbers of a dataset's classes (`ClassLabel`) by their names: what a dataset shows as
"B" is stored as 1."""

from collections.abc import Mapping
from typing import Any

Classes = list[str] | dict[str, "Classes"]
"""The names of a value's classes, or those of the parts of an object; lists are left out."""


def classes_in(features: Any) -> Classes | None:
    """The classes in a dataset's features, `{"answer": {"_type": "ClassLabel", "names": […]}}`;
    None if there are none."""
    if isinstance(features, list):  # an old form of a list's
        return classes_in(features[0]) if features else None
    if not isinstance(features, dict):
        return None
    kind = features.get("_type")
    if kind == "ClassLabel":
        return features.get("names") or None
    if isinstance(kind, str):  # a list of something, or a plain value
        return classes_in(features.get("feature"))
    parts = {name: classes_in(part) for name, part in features.items()}
    return {name: part for name, part in parts.items() if part is not None} or None


def with_names(value: Any, classes: Classes) -> Any:
    """The value with the names of its classes; None where a number, such as -1, has no name."""
    if isinstance(value, list):
        return [with_names(one, classes) for one in value]
    if isinstance(classes, list):
        if not isinstance(value, int):
            return value
        return classes[value] if 0 <= value < len(classes) else None
    if not isinstance(value, Mapping):
        return value
    own = classes.items()
    return {**value, **{name: with_names(value[name], c) for name, c in own if name in value}}

"""The base class of a config's sections, with the checks that all sections share."""

from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from opsd.common.schema import FirstErrors

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(FirstErrors):
    """Refuses unknown keys, infinities and NaN; checks default values like given ones.

    The docstring below a field becomes its description.
    """

    model_config = ConfigDict(
        extra="forbid", validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **more: Any) -> None:
        for field in cls.model_fields.values():
            field.description = " ".join((field.description or "").split())  # join its lines

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, values: Any) -> Any:
        """Refuse thousands of unknown keys at once: each would be an error of its own."""
        if isinstance(values, dict) and len(values) > 20 + (known := len(cls.model_fields)):
            raise ValueError(f"it has {len(values):,} keys, and only {known} exist")
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _check_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for a number: pydantic would take them as 1 and 0."""
        types = _types(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and bool not in types and {int, float} & types:
            raise ValueError("it must be a number")
        return value

    @field_validator("*")
    @classmethod
    def _check_plain(cls, value: Any) -> Any:
        _check_plain(value)
        return value


def _types(annotation: Any) -> set[Any]:
    """The classes that an annotation names, also inside a union or `Annotated`."""
    if get_origin(annotation) is Literal:
        return set()
    if get_origin(annotation) is Annotated:
        return _types(get_args(annotation)[0])
    inner = get_args(annotation)
    return {annotation} if not inner else set().union(*map(_types, inner))


def _check_plain(value: Any) -> None:
    """Refuse, also in lists and mappings: NUL, lone surrogates, large integers, other types."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("text may hold no NUL character")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("text may hold no half of a surrogate pair")
    elif isinstance(value, int):
        if abs(value) >= 2**63:
            raise ValueError("whole numbers must be less than 2**63")
    elif isinstance(value, list):
        for one in value:
            _check_plain(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            _check_plain(key)
            _check_plain(one)
    elif not isinstance(value, float | BaseModel | None):
        raise ValueError(
            f"it holds a {type(value).__name__}; values are text, numbers, lists and mappings"
        )

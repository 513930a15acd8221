"""Make plain records of what Python code passes as data."""

from collections.abc import Iterable, Mapping
from typing import Any

from opsd.common.errors import UserError
from opsd.data.files import transposed
from opsd.data.sources import encoded, part_of


def given_records(
    given: Any, split: str | None, default: str, section: str
) -> tuple[Iterable[Any], str | None]:
    """(the records, and the split if there are none to take it from).

    given: a Dataset or DatasetDict of `datasets`, a table of pandas, polars or pyarrow, columns in
    a dictionary, or anything that iterates over records. Raises UserError.
    """
    if isinstance(given, Mapping):
        rows = transposed({name: plain(column) for name, column in given.items()})
        if rows is not None:
            return rows, split
        if not all(hasattr(part, "features") for part in given.values()):
            had = ", ".join(map(repr, given))
            mend = "give a list of rows, or columns of equal length"
            raise UserError(f"{section}.source is an object with {had}: {mend}")
        given, split = part_of(given, split or default, section), None
    elif hasattr(given, "iterrows"):  # pandas
        if not given.columns.is_unique:
            raise UserError(f"{section}.source: the DataFrame has two columns of the same name")
        given = given.to_dict("records")
    elif hasattr(given, "to_dicts"):  # polars
        given = given.to_dicts()
    elif hasattr(given, "to_pylist"):  # pyarrow
        given = given.to_pylist()
    try:
        return map(plain, encoded(given)), split
    except TypeError:
        may = "it may be a list of rows, a Dataset, a DataFrame, or the name of a source"
        raise UserError(f"{section}.source is of type {type(given).__name__}: {may}") from None


def plain(value: Any) -> Any:
    """The value without arrays of numpy or torch, also inside of lists and objects."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if type(value) is dict:
        return {name: plain(part) for name, part in value.items()}
    return list(map(plain, value)) if type(value) is list else value

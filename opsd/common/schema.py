"""A base for pydantic's models of what may come from a stranger: few errors, whatever it holds.

pydantic collects an error of 1 to 4 kB for each wrong item: a list of ten million zeros where
objects belong would take gigabytes.
"""

from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler


def first_errors(schema: Any) -> Any:
    """A copy of pydantic's core schema whose lists, tuples and dicts end at their first error."""
    if isinstance(schema, dict):
        made = {key: first_errors(value) for key, value in schema.items()}
        if made.get("type") in ("list", "tuple", "dict"):
            made["fail_fast"] = True
        return made
    if isinstance(schema, list | tuple):
        return type(schema)(map(first_errors, schema))
    return schema


class FirstErrors(BaseModel):
    """Reports the first wrong item of each list and dict, not all of them."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return first_errors(handler(source))

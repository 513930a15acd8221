"""Regular expressions with names, from a TOML table, where each stands beside its examples."""

import re
from collections.abc import Mapping
from types import SimpleNamespace


def forms(table: Mapping[str, str]) -> SimpleNamespace:
    """Compile name → expression, whose lines are joined: `FORM.fraction.fullmatch(text)`."""
    return SimpleNamespace(**{k: re.compile(text.replace("\n", "")) for k, text in table.items()})

"""The notation of answers, read from notation.toml: characters, TeX commands, units and words."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

NOTATION = tomllib.loads(Path(__file__).with_name("notation.toml").read_text(encoding="utf-8"))
# The forms of answers by their names: `FORM.fraction.fullmatch(text)`.
FORM = SimpleNamespace(
    **{name: re.compile(text.replace("\n", "")) for name, text in NOTATION["patterns"].items()}
)

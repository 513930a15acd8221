"""The notation of answers, read from notation.toml: characters, TeX commands, units and words."""

from opsd.common.files import read_toml
from opsd.common.forms import forms

NOTATION = read_toml(__file__, "notation")
FORM = forms(NOTATION["patterns"])
"""The forms of answers by their names."""

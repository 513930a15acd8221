"""Parse named sets of numbers: `all positive reals`, `\\mathbb{R}^+`, `x \\neq \\pm 1`."""

import re

from opsd.grading.answers.notation import FORM, NOTATION

_SETS = [
    (re.compile(pattern, re.IGNORECASE), to) for pattern, to in NOTATION["number_sets"]["pairs"]
]


def number_set(text: str) -> str | None:
    """The set of numbers that words or a name denote, in TeX; None for anything else."""
    if not FORM.hint.search(text):
        return None
    for pattern, to in _SETS:
        if found := pattern.fullmatch(text):
            inside = found[1] if pattern.groups else ""
            return to.format(re.sub(r",? (?:and|or) ", ",", inside)) if pattern.groups else to
    several = "," in text or " and " in text or "\\pm" in text
    if several and (found := FORM.unequal.fullmatch(text)):
        values = re.sub(rf"{found[1]}\s*\\neq", "", found[2]).replace(" and ", ",")
        values = re.sub(r"\\pm\s*(\S+)", r"\1,-\1", values)
        return f"\\mathbb{{R}}\\setminus\\{{{values}\\}}"
    return None

"""Parse named sets of numbers: `all positive reals`, `\\mathbb{R}^+`, `x \\neq \\pm 1`."""

from __future__ import annotations

import re

_HINT = re.compile(r"mathbb|neq|real|number|integers")
_REAL = r"(?:all |any |the (?:set of )?)?(?:real )?numbers?(?: x)?(?: that are)?"
_SETS = [
    (re.compile(pattern, re.IGNORECASE), to)
    for pattern, to in (
        (
            r"\\mathbb\{R\}\s*(?:_|\^)\s*\{?(?:\+|>\s*0)\}?|(?:all )?positive real(?:s| numbers)",
            r"(0,\infty)",
        ),
        (
            r"\\mathbb\{R\}\s*_\s*\{\\ge\s*0\}|(?:all )?non-?negative real(?:s| numbers)",
            r"[0,\infty)",
        ),
        (
            r"\\mathbb\{R\}\s*(?:_|\^)\s*\{?-\}?|(?:all )?negative real(?:s| numbers)",
            r"(-\infty,0)",
        ),
        (
            r"\\mathbb\{[ZN]\}\s*(?:_|\^)\s*\{?(?:\+|\*|>\s*0)\}?|"
            r"(?:all )?(?:positive integers|natural numbers)",
            r"\mathbb{N}",
        ),
        (r"(?:all |the )?integers", r"\mathbb{Z}"),
        (rf"{_REAL} (?:greater|more|larger) than (?!or)(.+)", r"x>{}"),
        (rf"{_REAL} (?:less|smaller) than (?!or)(.+)", r"x<{}"),
        (rf"{_REAL} (?:at least|greater than or equal to) (.+)", r"x\ge {}"),
        (rf"{_REAL} (?:at most|less than or equal to) (.+)", r"x\le {}"),
        (
            r"(?:all |any )?real(?: number)?s?(?: x)? except(?: for)? *(?:x ?= ?)?(.+)",
            r"\mathbb{{R}}\setminus\{{{}\}}",
        ),
    )
]
_NOT = re.compile(r"([A-Za-z])\s*\\neq\s*((?:(?!\\(?:le|ge|in)(?![A-Za-z]))[^<>=])+)")


def number_set(text: str) -> str | None:
    """The set of numbers that words or a name denote, in TeX; None for anything else."""
    if not _HINT.search(text):
        return None
    for pattern, to in _SETS:
        if found := pattern.fullmatch(text):
            inside = found[1] if pattern.groups else ""
            return to.format(re.sub(r",? (?:and|or) ", ",", inside)) if pattern.groups else to
    if (found := _NOT.fullmatch(text)) and ("," in text or " and " in text or "\\pm" in text):
        values = re.sub(rf"{found[1]}\s*\\neq", "", found[2]).replace(" and ", ",")
        values = re.sub(r"\\pm\s*(\S+)", r"\1,-\1", values)
        return f"\\mathbb{{R}}\\setminus\\{{{values}\\}}"
    return None

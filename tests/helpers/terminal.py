"""Finds characters that control a terminal."""

import unicodedata


def obeyed(text: str) -> list[str]:
    """The characters on which a terminal acts, or that change how the others look."""
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs")]

"""What a terminal would act upon."""

import unicodedata


def obeyed(text: str) -> list[str]:
    """The characters that a terminal acts upon, or that change how the others look."""
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs")]

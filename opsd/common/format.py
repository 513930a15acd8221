"""Format numbers for people, in the same way in the terminal, the plots and the report."""

# ruff: noqa: RUF001 - the dashes and minus signs are intended: people read them

import math
from unicodedata import category


def shown(text: str, keep: str = "") -> str:
    """Escape foreign text for a terminal: control characters, escape sequences, invisible
    characters and those that change the direction of writing. keep: control characters to keep."""
    if text.isprintable():
        return text
    acts = {c for c in set(text) - set(keep) if category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    return text.translate({ord(c): c.encode("unicode_escape").decode() for c in acts})


def duration(seconds: float) -> str:
    """`0.4` → "0.4 s", `95` → "1 min 35 s", `3720` → "1 h 02 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(whole / 60), 60)
    return f"{hours} h {minutes:02d} min"


def size(count: float) -> str:
    """Bytes in powers of 1000: `93_100_000` → "93.1 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def percent(fraction: float) -> str:
    """`0.4567` → "45.7 %"."""
    return f"{100 * fraction:.1f} %"


def number(value: float) -> str:
    """Integers with thousands separators, others with three significant digits."""
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")  # "0.100", as wide as "0.213"


def labelled(name: str, value: object) -> str:
    """A field with the unit that its name implies: ("accuracy", 0.45) → "accuracy 45.0 %"."""
    label = name.replace("_", " ")
    if value is None:
        return f"{label} –"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"{label} {value}"
    if name.endswith("_per_second"):
        rate = round(value) if value >= 10 else value
        return f"{number(rate)} {label.removesuffix(' per second')}/s"
    if name.endswith("accuracy") or name.endswith("_fraction"):
        return f"{label.removesuffix(' fraction')} {percent(value)}"
    if name.endswith("bytes"):
        return f"{label.removesuffix('bytes').strip() or 'memory'} {size(value)}"
    if name.endswith("seconds"):
        return f"{label.removesuffix('seconds').strip() or 'time'} {duration(value)}"
    return f"{label} {number(value)}"

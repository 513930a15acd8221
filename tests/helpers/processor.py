"""The instruction sets that this processor has: tests of the others are not collected."""

from collections.abc import Iterator
from contextlib import contextmanager

from opsd_kernels.tiles import cpp


@contextmanager
def using(name: str) -> Iterator[bool]:
    """Run the C++ kernels with this instruction set; yields whether the processor has it."""
    best, choose = cpp.instruction_set(), cpp._library().opsd_use_instruction_set
    try:
        yield bool(choose(name.encode()))
    finally:
        choose(best.encode())


def instruction_sets(*names: str) -> list[str]:
    """Those of `names` that this processor has."""
    if cpp.unusable_because() is not None:
        return []
    found = []
    for name in names:
        with using(name) as has:
            found += [name] if has else []
    return found

"""The process that compares answers with math-verify; `grader.Grader` starts and kills it.

It is run by its path: of this package only `normalise` is loaded here, and no torch. It writes one
JSON object a line: first `{"ready": true}` or `{"error": text}`, then for each line
`[answer, reference]` on stdin one `{"correct": bool, "reason": text}`, with `"last": true` if the
process then ends. It ends with its stdin.
"""

import json
import os
import signal
import sys

from normalise import same_logarithm, to_latex


def make_compare():
    """Returns compare(answer, reference) → (correct, reason), with its lazy imports done."""
    import logging

    import sympy  # noqa: F401 - here, where its seconds are not an answer's
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    forms = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def read(text: str) -> list:
        # math-verify's own time limits use SIGALRM, which cannot interrupt one long C call; the
        # parent's kill can.
        boxed = "\\boxed{" + to_latex(text) + "}"
        return parse(boxed, extraction_config=forms, parsing_timeout=None)

    def equal(wanted: list, given: list, percent: bool) -> bool:
        try:  # the reference goes first: verify() is not symmetric
            equal = verify(
                wanted,
                given,
                timeout_seconds=None,
                allow_set_relation_comp=True,
                raise_on_error=True,
            )
            return bool(equal) and _close(wanted[0], given[0], percent)
        except MemoryError:
            raise
        except Exception:
            # sympy raises nearly anything on nonsense; the last entry is the normalised text
            return bool(wanted) and wanted[-1] == given[-1]

    def compare(answer: str, reference: str) -> tuple[bool, str]:
        reference, answer = same_logarithm(reference, answer)
        wanted, given = read(reference), read(answer)
        if not given:
            return False, "the answer cannot be read as mathematics"
        percent = "%" in reference + answer
        right = equal(wanted, given, percent)
        if not right and percent:  # 12.5 for 12.5 %
            bare = [read(text.replace("\\%", "").replace("%", "")) for text in (reference, answer)]
            right = bool(bare[1]) and equal(*bare, percent=False)
        if not right and wanted and " or" in answer.replace("{or", "{ or"):
            right = _same_alternatives(wanted[0], given[0])
        if not right and wanted:
            right = _same_complex(wanted[0], given[0])
        return right, "equal" if right else "different"

    compare("x/2", "\\frac{1}{2}x")
    return compare


def _close(one, other, percent: bool) -> bool:
    """Whether two constants are equal relative to their size; True for anything but constants.

    math-verify rounds to six decimals: to it 1e-20 equals 2e-20. percent: one of them is written
    with a percent sign, and may mean a hundredth.
    """
    import sympy

    constants = all(isinstance(side, sympy.Expr) and side.is_number for side in (one, other))
    if not constants or one == other:
        return True
    one, other = sympy.N(one), sympy.N(other)
    if not all(side.is_finite for side in (one, other)):
        return True
    scales = (1, 100, sympy.Rational(1, 100)) if percent else (1,)
    return any(
        bool(abs(one - scale * other) <= 1e-5 * max(abs(one), abs(scale * other)))
        for scale in scales
    )


def _same_alternatives(reference, given) -> bool:
    """Whether `x<1 or x>2`, to math-verify a set of relations, is this set of numbers."""
    import sympy

    if not isinstance(reference, sympy.Set) or not isinstance(given, sympy.FiniteSet):
        return False
    if not all(isinstance(one, sympy.core.relational.Relational) for one in given):
        return False
    return sympy.Union(*(one.as_set() for one in given)) == reference


def _same_complex(reference, given) -> bool:
    """Whether both sides are equal if every symbol `i` is the imaginary unit."""
    import sympy

    sides = (reference, given)
    if not all(isinstance(side, sympy.Expr) for side in sides):
        return False
    units = {s: sympy.I for side in sides for s in side.free_symbols if s.name == "i"}
    if not units:
        return False
    difference = reference.subs(units) - given.subs(units)
    return sympy.simplify(difference) == 0


def limit_memory(bytes_: int) -> None:
    """Makes allocations beyond `bytes_` of address space fail, if the system supports that."""
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_AS, (bytes_, bytes_))
    except (ValueError, OSError):  # macOS refuses; the time limit still holds there
        pass


def limit_cpu(seconds: float) -> None:
    """Has the system kill this process after so much more CPU time; 0 removes the limit.

    It is CPU time because on a busy machine an honest answer may wait for its turn, and the signal
    keeps its default action because a Python handler cannot interrupt one long computation in C.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)


def main(memory_limit: int, timeout: float) -> None:
    """Grade what stdin asks, a JSON line each, and answer on stdout."""
    # Whatever a library prints must not end up between our lines.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def reply(**fields) -> None:
        replies.write(json.dumps(fields) + "\n")

    try:
        compare = make_compare()
        limit_memory(memory_limit)
    except Exception as error:
        reply(error=f"{type(error).__name__}: {error}")
        return
    reply(ready=True)
    for line in sys.stdin:
        answer, reference = json.loads(line)
        limit_cpu(timeout)
        try:
            correct, reason = compare(answer, reference)
        except MemoryError:
            reply(correct=False, reason="comparing the answer takes too much memory", last=True)
            return  # the parent starts a process with a clean memory
        limit_cpu(0)
        reply(correct=correct, reason=reason)


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, whose modules must not shadow others
    main(int(sys.argv[1]), float(sys.argv[2]))

"""The process that judges answers with math-verify; `grading.Grader` starts and kills it.

It is run by its path, not imported: nothing of this package (and so no torch) is loaded here. One
JSON object a line: first `{"ready": true}` or `{"error": text}` on stdout, then for each
`{"answer": …, "completion": …}` on stdin one `{"correct": bool, "reason": text}`, with `"last":
true` if the process then ends. It ends with its stdin.
"""

import json
import os
import re
import sys

_COMMANDS = "pi|sin|cos|tan|cot|sec|csc|log|ln|exp|infty|theta|alpha|beta"
_PLAIN_COMMAND = re.compile(rf"(?<![\\A-Za-z])({_COMMANDS})(?![A-Za-z])")
_MIXED_NUMBER = re.compile(r"(?<![\d.])(\d+)\s+(\d+)/(\d+)(?![\d.])")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)")
# Three letters or more: `12 xy` is a product.
_NUMBER_WITH_UNIT = re.compile(
    rf"([+-]?[\d.,/]*\d)\s+(?!(?:{_COMMANDS}|sqrt)\b)[A-Za-z]{{3,}}(?:\s[A-Za-z]+)*"
)
_PLAIN_SQRT = re.compile(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)")


def to_latex(answer: str) -> str:
    """`sqrt(2)*pi` → `\\sqrt{2}*\\pi`, `1 1/2`, `1e3` and `18 dollars` likewise.

    math-verify reads plain words as products of letters, and the numbers side by side as products.
    """
    if unit := _NUMBER_WITH_UNIT.fullmatch(answer.strip()):
        return unit[1]
    answer = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", answer)
    answer = _SCIENTIFIC.sub(r"\1\\times10^{\2}", answer)
    answer = _PLAIN_SQRT.sub(r"\\sqrt{\1}", answer)
    return _PLAIN_COMMAND.sub(r"\\\1", answer)


def make_judge():
    """Returns judge(answer, completion) → (correct, reason), with its lazy imports done."""
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    forms = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def read(text: str) -> list:
        # math-verify's own time limits use SIGALRM, which cannot interrupt one long C call; the
        # parent's kill can.
        boxed = "\\boxed{" + to_latex(text) + "}"
        return parse(boxed, extraction_config=forms, parsing_timeout=None)

    def judge(answer: str, completion: str) -> tuple[bool, str]:
        reference, given = read(answer), read(completion)
        if not given:
            return False, "the answer cannot be read as mathematics"
        try:  # the reference goes first: verify() is not symmetric
            equal = verify(
                reference,
                given,
                timeout_seconds=None,
                allow_set_relation_comp=True,
                raise_on_error=True,
            )
        except MemoryError:
            raise
        except (
            Exception
        ):  # sympy raises nearly anything on nonsense; the last entry is the normalised text
            equal = bool(reference) and reference[-1] == given[-1]
        return bool(equal), "equal" if equal else "different"

    judge("\\frac{1}{2}x", "x/2")
    return judge


def limit_memory(bytes_: int) -> None:
    """Makes allocations beyond `bytes_` of address space fail, where the system supports it."""
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_AS, (bytes_, bytes_))
    except (ValueError, OSError):  # macOS refuses; the time limit still holds there
        pass


def limit_cpu_seconds(seconds: float) -> None:
    """Ends this process after so much more CPU time: it must not outlive its parent by long."""
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def main(memory_limit: int, timeout: float) -> None:
    # Whatever a library prints must not end up between our lines.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def reply(**fields) -> None:
        replies.write(json.dumps(fields) + "\n")

    try:
        judge = make_judge()
        limit_memory(memory_limit)
    except Exception as error:
        reply(error=f"{type(error).__name__}: {error}")
        return
    reply(ready=True)
    for line in sys.stdin:
        job = json.loads(line)
        limit_cpu_seconds(2 * timeout)
        try:
            correct, reason = judge(job["answer"], job["completion"])
        except MemoryError:
            reply(correct=False, reason="comparing the answer takes too much memory", last=True)
            return  # the parent starts a process with a clean memory
        reply(correct=correct, reason=reason)


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder, whose modules must not shadow others
    main(int(sys.argv[1]), float(sys.argv[2]))

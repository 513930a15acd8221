"""The process that judges answers with math-verify; `grading.Grader` starts and kills it.

It is run by its path: of this package only `answers` is loaded here, and no torch. One JSON
object a line: first `{"ready": true}` or `{"error": text}` on stdout, then for each
`{"answer": …, "completion": …}` on stdin one `{"correct": bool, "reason": text}`, with `"last":
true` if the process then ends. It ends with its stdin.
"""

import json
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[2])  # the same opsd as its parent's

from opsd.grading.answers.compare import compare

if __name__ == "__main__":
    sys.path.pop(0)  # whatever else lies there must not shadow other modules


def make_judge(strict: bool):
    """Returns judge(answer, completion) → (correct, reason), with its lazy imports done."""
    from opsd.grading.answers.symbolic import Algebra

    algebra = Algebra()

    def judge(answer: str, completion: str) -> tuple[bool, str]:
        try:
            return compare(answer, completion, algebra, strict)
        except MemoryError:
            raise
        except Exception as error:  # sympy raises nearly anything on nonsense
            return False, f"cannot be compared: {type(error).__name__}"

    judge("\\frac{1}{2}x", "x/2")
    return judge


def limit_memory(bytes_: int) -> None:
    """Makes allocations beyond `bytes_` of address space fail, where the system supports it."""
    import resource

    try:
        resource.setrlimit(resource.RLIMIT_AS, (bytes_, bytes_))
    except (ValueError, OSError):  # macOS refuses; the time limit still holds there
        pass


def limit_cpu(seconds: float) -> None:
    """Lets the kernel end this process after so much more CPU time; 0 takes the limit back.

    CPU time, since on a busy machine an honest answer may wait for its turn; and the signal's
    default action, since a handler of Python's cannot interrupt one long computation in C.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)


def main(memory_limit: int, timeout: float, strict: bool) -> None:
    """Answers jobs until stdin ends."""
    # Whatever a library prints must not end up between our lines.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def reply(**fields) -> None:
        replies.write(json.dumps(fields) + "\n")

    try:
        judge = make_judge(strict)
        limit_memory(memory_limit)
    except Exception as error:
        reply(error=f"{type(error).__name__}: {error}")
        return
    reply(ready=True)
    for line in sys.stdin:
        job = json.loads(line)
        limit_cpu(timeout)
        try:
            correct, reason = judge(job["answer"], job["completion"])
        except MemoryError:
            reply(correct=False, reason="comparing the answer takes too much memory", last=True)
            return  # the parent starts a process with a clean memory
        limit_cpu(0)
        reply(correct=correct, reason=reason)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), "strict" in sys.argv[3:])

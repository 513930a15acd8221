"""The work of the grader's worker processes (see `opsd.common.workers`): compare by math-verify.

Loads only `answers` of this package, and no torch. A job is JSON of [extracted answer, reference];
the reply is JSON of [correct, reason].
"""

import json
from collections.abc import Callable


def make(strict: str = "") -> Callable[[bytes], bytes]:
    """Returns the function that answers a job, after a first comparison that does lazy imports."""
    try:
        from opsd.grading.answers.compare import compare
        from opsd.grading.answers.symbolic import Algebra

        algebra = Algebra()
    except ImportError as error:
        raise ImportError(f"{error}: `pip install --force-reinstall math-verify`") from None

    def judge(completion: str, answer: str) -> tuple[bool, str]:
        try:
            return compare(answer, completion, algebra, bool(strict))
        except MemoryError:
            raise
        except Exception as error:  # sympy can raise anything for nonsense
            return False, f"cannot be compared: {type(error).__name__}"

    judge("x/2", "\\frac{1}{2}x")
    return lambda job: json.dumps(judge(*json.loads(job))).encode()

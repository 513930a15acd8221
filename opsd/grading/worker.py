"""What a worker process (`opsd.common.workers`) of the grader does: it judges with math-verify.

Of this package only `answers` is loaded there, and no torch. A job is the JSON of an answer as it
was extracted and its reference; the reply that of the verdict and its reason.
"""

import json
from collections.abc import Callable


def make(strict: str = "") -> Callable[[bytes], bytes]:
    """What answers a job, with its lazy imports done."""
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
        except Exception as error:  # sympy raises nearly anything on nonsense
            return False, f"cannot be compared: {type(error).__name__}"

    judge("x/2", "\\frac{1}{2}x")
    return lambda job: json.dumps(judge(*json.loads(job))).encode()

"""The work of a worker process (see `workers`): tries an adapter's patterns on the names of a
model's modules, as peft will. Some patterns take 2^n steps for a name of n letters.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress

FORMS = ("{}$", r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.")
"""What peft 0.21 makes of a pattern."""


def make() -> Callable[[bytes], bytes]:
    """Returns the function that answers a job, a pair of lists: patterns and names."""
    return answer


def answer(job: bytes) -> bytes:
    """Answers b"" once all patterns have been tried."""
    patterns, names = json.loads(job)
    for form in FORMS:
        for pattern in patterns:
            with suppress(re.error):  # peft will say so
                found = re.compile(form.replace("{}", pattern))
                for name in names:
                    found.match(name)
    return b""

"""Rows and messages that tests of data have in many shapes."""

from opsd.data.rows import Row

RECORDS = [
    {"problem": f"{n} + 1?", "solution": f"So, {n} + 1\n= {n + 1}", "answer": str(n + 1)}
    for n in range(4)
]


ROWS = [Row(*record.values(), record) for record in RECORDS]


USER = {"role": "user", "content": "1 + 1?"}


ANSWER = {"role": "assistant", "content": "So 2."}

"""What may come from a stranger is refused with few errors, however much of it is wrong."""

import importlib

import pytest
from pydantic import BaseModel, ValidationError

READERS = [
    "opsd.runs.records", "opsd.rollout.vllm_answers", "opsd.rollout.sglang_answers",
    "opsd.prefix.state_server", "opsd.models.remote", "opsd.config.config",
]  # fmt: skip
LONG = 1000
WRONG = [[0] * LONG, [[]] * LONG, [{}] * LONG, {str(n): [] for n in range(LONG)}]


@pytest.mark.parametrize("reader", READERS)
def test_much_that_is_wrong_makes_few_errors(reader):
    fields = 0
    for kind in vars(importlib.import_module(reader)).values():
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for field in kind.model_fields:
                fields += 1
                for wrong in WRONG:
                    try:
                        kind.model_validate({field: wrong})
                    except ValidationError as error:
                        assert error.error_count() < 100, (kind, field)
    assert fields

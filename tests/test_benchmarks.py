"""The known benchmarks, on small files in the schema of the real ones."""

import json

import datasets
import pytest

from opsd.errors import UserError
from opsd.evaluate.benchmarks import KNOWN, Convention, load_benchmark
from opsd.evaluate.grading import Grader

# name → a record as the hub's dataset has it, and the answer it should give
SCHEMA = {
    "gsm8k": (
        {
            "question": "Anna has 4 apples and buys 3 bags of 12. How many?",
            "answer": "She buys 3*12 = <<3*12=36>>36.\nSo she has 36+4 = <<36+4=40>>40.\n#### 40",
        },
        "40",
    ),
    "math-500": (
        {
            "problem": "Compute $1/4 + 1/4$.",
            "solution": "Both are equal, so it is $\\boxed{\\frac{1}{2}}$.",
            "answer": "\\frac{1}{2}",
            "subject": "Algebra",
            "level": 1,
            "unique_id": "test/algebra/1.json",
        },
        "\\frac{1}{2}",
    ),
    "aime24": (
        {
            "id": 60,
            "problem": "Find $2^3+25$.",
            "solution": "It is $8 + 25 = \\boxed{033}$.",
            "answer": "033",
            "url": "https://example.org",
            "year": "2024",
        },
        "033",
    ),
    "aime25": ({"problem": "Find $70$.", "answer": "70", "id": "0"}, "70"),
}


def test_every_known_benchmark_has_a_schema_here():
    assert set(SCHEMA) == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_local_copies_in_the_real_schema(name, tmp_path):
    record, answer = SCHEMA[name]
    (tmp_path / "copy.jsonl").write_text(json.dumps(record) + "\n")
    benchmark = load_benchmark(name, source=str(tmp_path / "copy.jsonl"))
    (row,) = benchmark.rows
    assert row.problem == record.get("question", record.get("problem"))
    assert row.answer == answer and row.columns == record
    assert row.solution == record.get("solution", record["answer"] if name == "gsm8k" else "")
    with Grader() as grader:
        # the reference answer itself is right, and so is the plain form of an AIME answer
        assert grader.grade([f"\\boxed{{{answer.lstrip('0')}}}"], [row.answer])[0].correct
        assert not grader.grade(["\\boxed{999}"], [row.answer])[0].correct


def test_hub_names_splits_and_spellings(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, revision):
        asked.append((name, config, split))
        (record,) = (SCHEMA[key][0] for key in KNOWN if KNOWN[key].source == name)
        return datasets.Dataset.from_list([record])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = [load_benchmark(name).name for name in ("GSM8K", "MATH_500", "AIME-2024", "aime25")]
    assert names == ["gsm8k", "math-500", "aime24", "aime25"]
    assert asked == [
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("math-ai/aime25", None, "test"),
    ]
    assert load_benchmark("aime24").convention == Convention(12, 1.0, 38_912)
    load_benchmark("gsm8k", split="train")
    assert asked[-1] == ("openai/gsm8k", "main", "train")


def test_any_source_is_a_benchmark(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"q": "1+1?", "answer": 2}\n{"q": "2+2?", "answer": 4}\n')
    benchmark = load_benchmark(str(path), columns={"problem": "q"}, limit=1)
    assert [row.answer for row in benchmark.rows] == ["2"]
    assert (benchmark.name, benchmark.convention, benchmark.prompt) == (
        str(path),
        Convention(),
        None,
    )
    drawn = load_benchmark("reasoning_gym:chain_sum", options={"max_terms": 3})
    assert len(drawn.rows) == 200
    assert len(load_benchmark("reasoning_gym:chain_sum", size=7).rows) == 7


def test_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, arguments, message in [
        ("gsm8", {}, r"benchmark: 'gsm8' .*did you mean 'gsm8k'.*math-500, aime24.*reasoning_gym"),
        ("absent.jsonl", {}, r"benchmark\.source: there is no file"),
        ("reasoning_gym:nothing", {}, r"benchmark\.source: .*no task 'nothing'"),
        ("other/set", {"source": "x.jsonl"}, r"benchmark: 'other/set' is none of gsm8k"),
        ("reasoning_gym:chain_sum", {"require": ("solution",)}, r"benchmark\.columns\.solution"),
    ]:
        with pytest.raises(UserError, match=message):
            load_benchmark(name, **arguments)
